"""EWC, SI and MAS along a TaskStream: measured where a task ends, by its own rows; resumed, compared, continued."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft import EWC, MAS, Refusal, SynapticIntelligence, TaskStream
from lightning_ft.engine.importance import importance
from lightning_ft.engine.likelihood import LogLikelihood
from tests.data.streams import Layer, Points, Saves, stream, trainer, weights

PENALTIES = {
    "ewc": lambda: EWC(20.0, labels="all"),
    "online": lambda: EWC(20.0, mode="online", gamma=0.5),
    "si": lambda: SynapticIntelligence(5.0, xi=0.01),
    "mas": lambda: MAS(1.0),
}


class AtTaskEnds(Callback):
    """Measures by hand what EWC has to measure, before it does."""

    def __init__(self):
        self.found = []

    def on_task_end(self, trainer, module, task):
        ask = LogLikelihood("all", 0, task.index)
        information = importance(trainer, module, task.batches(), ask)
        self.found.append((information.diagonal, {n: p.detach().clone() for n, p in module.named_parameters()}))


def state_of(technique):
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return json.dumps(plain(technique.state_dict()))


def test_each_task_is_measured_by_its_own_rows_where_it_ends(tmp_path):
    technique, by_hand = EWC(20.0, labels="all"), AtTaskEnds()
    module = Layer()
    trainer(tmp_path, by_hand, technique).fit(module, stream())
    assert technique._held.tasks == 3 and technique._next is None
    for name, held in technique._held.importance.items():
        total = sum(diagonal[name] for diagonal, _ in by_hand.found)
        torch.testing.assert_close(held, total)
        mean = sum(diagonal[name] * star[name] for diagonal, star in by_hand.found) / total
        torch.testing.assert_close(technique._held.center[name][total > 0], mean[total > 0])


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_run_resumed_anywhere_is_the_unbroken_one(kind, tmp_path):
    module, technique = Layer(), PENALTIES[kind]()
    run = trainer(tmp_path, technique, Saves(tmp_path, "batch", "validation", "epoch"))
    run.fit(module, stream())
    free = Layer()
    trainer(tmp_path, Saves(tmp_path / "free")).fit(free, stream())
    assert any(not torch.equal(v, weights(free)[n]) for n, v in weights(module).items()), "the penalty did something"
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) > 8
    # Of those saved after the very last batch, the end of the last task is still to come.
    ends = {tmp_path / "batch-10.ckpt", tmp_path / "validation-5.ckpt"}
    assert ends < set(files)
    for file in sorted({*files[2::5], *ends}):
        resumed, again = Layer(), PENALTIES[kind]()
        trainer(tmp_path / "again", again).fit(resumed, stream(), ckpt_path=file)
        assert all(torch.equal(v, weights(resumed)[n]) for n, v in weights(module).items()), file.name
        assert state_of(again) == state_of(technique), file.name


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_naive_baseline_is_the_run_without_it(kind, tmp_path):
    free, module, technique = Layer(), Layer(), PENALTIES[kind]()
    trainer(tmp_path).fit(free, stream())
    trainer(tmp_path, technique).fit(module, stream(baseline="naive"))
    assert all(torch.equal(v, weights(free)[n]) for n, v in weights(module).items())
    assert technique.state_dict() == {}


def test_the_next_command_is_held_to_the_tasks_of_the_last(tmp_path):
    first, technique = Layer(), EWC(20.0, labels="all")
    run = trainer(tmp_path, technique)
    run.fit(first, stream())
    run.save_checkpoint(tmp_path / "last.ckpt")
    star = {n: v.clone() for n, v in technique._held.center.items()}
    again = EWC(20.0, labels="all")
    held = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            held.append((again._held.tasks, {n: v.clone() for n, v in again._held.center.items()}))

    more = TaskStream({"d": Points(1, 10)}, continue_from=str(tmp_path / "last.ckpt"))
    trainer(tmp_path / "next", again, Look()).fit(Layer(), more)
    assert held[0][0] == 3 and all(torch.equal(v, star[n]) for n, v in held[0][1].items())
    assert again._held.tasks == 4


def test_a_stream_that_does_not_tell_where_tasks_end_is_refused(tmp_path):
    with pytest.raises(
        Refusal, match="EWC acts between tasks, and a stream with scenario free does not tell where one ends"
    ):
        trainer(tmp_path, EWC()).fit(Layer(), stream(scenario="free"))


def test_what_is_held_is_told_by_name_and_not_by_order(tmp_path):
    """Trap 8: the same parts, made in another order, are held to their own values."""

    class Turned(Layer):
        def __init__(self):
            super().__init__()
            bias, weight = self.net.bias, self.net.weight
            del self.net.weight, self.net.bias
            self.net.bias, self.net.weight = bias, weight

    technique = EWC(20.0, labels="all")
    trainer(tmp_path, technique).fit(Layer(), stream())
    state = technique.state_dict()
    turned, again = Turned(), EWC(20.0, labels="all")
    assert [n for n, _ in turned.named_parameters()] == ["net.bias", "net.weight"]
    again.load_state_dict(state)
    again.on_train_start = lambda run, module: (EWC.on_train_start(again, run, module), held.append(again._held.copy()))
    held = []
    trainer(tmp_path, again).fit(turned, TaskStream({"d": Points(1, 10)}))
    for name, value in state["held"]["center"].items():
        assert torch.equal(held[0].center[name], value) and held[0].center[name].shape == value.shape
    assert held[0].tasks == 3
