"""Replay: the contract, the losses of the papers written out, and the memory in a run."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_ft import LoRA, Refusal, Replay
from lightning_ft.data.batch_rows import batch_of
from lightning_ft.functional.soft_targets import logit_distance_sum, top_kl
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, chat_job, fit, rows, state, trainer
from tests.data.streams import Hooks, Layer, Saves, stream
from tests.data.streams import trainer as run_of
from tests.data.streams import weights as weights_of

CASE = Case(Replay, small={"size": 6}, idle={"weight": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


class Speaks(PlainNet):
    """Says its logits."""

    def logits(self, batch: Any) -> torch.Tensor:
        return self(batch[0]).float()


class Watch(Callback):
    """The weights before each step, and what the memory held and drew then."""

    def __init__(self, technique: Replay) -> None:
        self.technique, self.steps = technique, []

    def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
        memory = self.technique._memory
        count = len(batch[0])
        draws = [memory.buffer.draw(count, 2 * run.global_step + which) for which in range(2)]
        self.steps.append((copy.deepcopy(module.net).double(), [t.clone() for t in batch], copy.deepcopy(draws)))


@pytest.mark.parametrize("mode", ["er", "der", "der++"])
def test_each_step_is_that_of_the_paper_s_loss(tmp_path, mode):
    """Three steps in float32 against the loss written out in float64, step by step."""
    net, technique = Speaks(), Replay(6, mode=mode, weight=0.7, alpha=0.3, beta=0.4)
    watch = Watch(technique)
    net_after = []

    class After(Callback):
        def on_train_batch_end(self, run, module, *_):
            net_after.append(copy.deepcopy(module.net).double())

    fit(tmp_path, net, technique, watch, After())
    assert [len(draws[0]) for _, _, draws in watch.steps] == [0, 4, 4]
    for (before, (x, y), draws), after in zip(watch.steps, net_after, strict=True):
        loss = nn.functional.cross_entropy(before(x.double()), y)
        if draws[0]:
            mx, my = batch_of(draws[0])
            replayed = nn.functional.cross_entropy(before(mx.double()), my)
            dx, _ = batch_of(draws[1])
            distance = torch.zeros((), dtype=torch.float64)
            for n, one in enumerate(draws[1]):
                if mode != "er":
                    z, h = one["logits"][0].double(), before(dx.double())[n]
                    distance = distance + sum((z[c] - h[c]) ** 2 for c in range(len(z))) / len(draws[1])
            loss = (
                loss
                + {
                    "er": 0.7 * replayed,
                    "der": 0.3 * distance,
                    "der++": 0.3 * distance + 0.4 * replayed,
                }[mode]
            )
        loss.backward()
        for a, b in zip(before.parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(b, a - 0.5 * a.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("of", "accumulate", "steps"), [(1, 4, 1), (3, 2, 2), (5, 4, 1), (2, 3, 2)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("mode", ["er", "der"])
def test_uneven_shares_are_the_mean_over_what_was_drawn(tmp_path, mode, of, accumulate, steps):
    """A user's own mean loss: rows that do not divide by the micro-batches weigh the same each, or none."""
    net, technique, seen, after = Speaks(), Replay(8, mode=mode, weight=0.7, alpha=0.3, rows=of), [], []

    class Look(Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
            if batch_idx % accumulate == 0:
                drawn = technique._memory.buffer.draw(of, 2 * run.global_step + (mode == "der"))
                seen.append((copy.deepcopy(module.net).double(), [], copy.deepcopy(drawn)))
            seen[-1][1].append([t.clone() for t in batch])

        def on_train_batch_end(self, run, module, outputs, batch, batch_idx) -> None:
            after.append(copy.deepcopy(module.net).double())

    epochs = 2  # so that something is kept when the second begins
    fit(tmp_path, net, technique, Look(), accumulate_grad_batches=accumulate, max_steps=-1, max_epochs=epochs)
    assert len(seen) == epochs * steps and len(seen[-1][2]) == of
    done = 0
    for before, batches, drawn in seen:
        micro = len(batches)
        done += micro
        # Lightning divides by the accumulation, also where the last window is shorter: for both parts alike.
        loss = sum(nn.functional.cross_entropy(before(x.double()), y) for x, y in batches) / micro
        if drawn:
            mx, my = batch_of(drawn)
            if mode == "er":
                loss = loss + 0.7 * nn.functional.cross_entropy(before(mx.double()), my)
            else:
                z = torch.cat([row["logits"] for row in drawn]).double()
                loss = loss + 0.3 * (z - before(mx.double())).square().sum() / of
        (loss * micro / accumulate).backward()
        for a, b in zip(before.parameters(), after[done - 1].parameters(), strict=True):
            torch.testing.assert_close(b, a - 0.5 * a.grad, rtol=1e-5, atol=1e-6)


def test_with_steps_rows_are_offered_in_the_first_pass_alone(tmp_path):
    """13 steps of four rows over ten: the window in which the second pass begins is the last that offers its rows."""
    technique, offered = Replay(50, balance="task"), {}

    class Look(Callback):
        def on_task_end(self, run, module, task) -> None:
            offered[task.name] = technique._memory.buffer.seen[task.name]

    run_of(tmp_path, technique, Look()).fit(Layer(), stream(epochs=1, steps={"a": 13, "b": 3, "c": 1}))
    assert offered == {"a": 12, "b": 8, "c": 4}


class Told(Layer):
    """Says its logits, and notes whose rows it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[float]] = []

    def logits(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0]).float()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch[0][:, 0].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("offer", ["step", "task"])
@pytest.mark.parametrize("balance", ["none", "task"])
def test_rows_may_wait_for_the_end_of_their_task(tmp_path, offer, balance):
    """By task only rows of earlier ones are replayed, and the first task has none; each row is offered once, of several epochs."""
    module, technique = Told(), Replay(9, offer=offer, balance=balance)
    data = stream()
    own = {name: set(part.points().tensors[0][:, 0].tolist()) for name, part in data.tasks.items()}
    replayed: dict[str, set[str]] = {}

    class Look(Callback):
        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            again = module.trained[1] if len(module.trained) > 1 else []
            of = {name for value in again for name in own if value in own[name]}
            replayed.setdefault(run.datamodule.task.name, set()).update(of)
            module.trained.clear()

    run_of(tmp_path, technique, Look()).fit(module, data)
    kept = technique._memory
    assert sum(kept._offered.seen.values()) == 10 + 6 + 9 and len(kept.buffer) == 9
    assert kept.state()["buffer"] == kept._offered.state()
    here = {"a": {"a"}, "b": {"a", "b"}, "c": {"a", "b", "c"}}
    assert replayed == (here if offer == "step" else {name: seen - {name} for name, seen in here.items()})


def test_of_rows_that_waited_is_kept_what_the_model_said_when_their_task_ended(tmp_path):
    module, technique, said = Told(), Replay(9, mode="der", offer="task"), {}

    class Look(Callback):
        def on_task_end(self, run, module, task):
            x = run.datamodule.tasks[task.name].points().tensors[0]
            said.update(zip(x[:, 0].tolist(), module.net(x).detach(), strict=True))

    run_of(tmp_path, technique, Look()).fit(module, stream())
    rows_kept = technique._memory.buffer.groups[""]
    assert len({id(said[float(row["plain"][0][0])]) for row in rows_kept}) == 9
    for row in rows_kept:
        torch.testing.assert_close(row["logits"][0], said[float(row["plain"][0][0])])


def test_without_a_stream_rows_wait_for_the_end_of_the_fit(tmp_path):
    net, technique = PlainNet(), Replay(6, offer="task")
    first = fit(tmp_path, net, technique, max_steps=-1, max_epochs=2)
    assert "train/replay" not in first.callback_metrics and len(technique._memory.buffer) == 6
    assert technique._memory.buffer.num_seen == 16
    second = fit(tmp_path, net, technique, max_steps=1)
    assert float(second.callback_metrics["train/replay"]) > 0


@pytest.mark.parametrize("mode", ["er", "der++"])
def test_a_run_resumed_in_a_task_goes_on_with_the_rows_that_wait(tmp_path, mode):
    options = {"size": 7, "offer": "task", "mode": mode}
    whole, one = Told(), Replay(**options)
    run_of(tmp_path, one, Hooks(), Saves(tmp_path, "batch")).fit(whole, stream())
    for number in (2, 8):
        again, other = Told(), Replay(**options)
        run_of(tmp_path, other, Hooks()).fit(
            again, stream(), ckpt_path=tmp_path / f"batch-{number}.ckpt", weights_only=True
        )
        assert all(
            torch.equal(a, b) for a, b in zip(weights_of(whole).values(), weights_of(again).values(), strict=True)
        )


def test_a_memory_whose_rows_waited_goes_on_by_step_and_the_other_way_round(tmp_path):
    for before, after in (("step", "task"), ("task", "step")):
        technique = Replay(6, offer=before)
        fit(tmp_path, PlainNet(), technique, max_steps=2)
        technique._memory.end_task()
        other = Replay(6, offer=after)
        other.load_state_dict(copy.deepcopy(technique.state_dict()))
        run = fit(tmp_path, PlainNet(), other, max_steps=1)
        assert float(run.callback_metrics["train/replay"]) > 0 and other._memory._offered.num_seen == 12


def test_what_is_kept_of_a_row_is_what_the_model_said_after_its_step_in_eval_mode(tmp_path):
    net = Speaks()
    net.net = nn.Sequential(*net.net[:2], nn.Dropout(0.5), *net.net[2:])
    technique = Replay(4, mode="der")
    fit(tmp_path, net, technique, max_steps=1)
    assert net.training
    net.eval()
    x, _ = rows()
    for row in technique._memory.buffer.groups[""]:
        place = next(n for n in range(4) if torch.equal(x[n], row["plain"][0]))
        torch.testing.assert_close(row["logits"], net(x[place : place + 1]).detach())


def test_the_kept_tokens_and_the_rest_against_loops():
    drawn = torch.Generator().manual_seed(0)
    old, new = (torch.randn(3, 7, generator=drawn, dtype=torch.float64) for _ in range(2))
    new.requires_grad_()
    log_p, index = old.log_softmax(1).topk(3)
    rest = torch.log1p(-log_p.exp().sum(1))
    value, slope = top_kl(log_p, rest, new.detach(), index)
    for n in range(3):
        p, q = old[n].softmax(0), new[n].softmax(0)
        kept = index[n].tolist()
        others = [v for v in range(7) if v not in kept]
        p_rest, q_rest = sum(p[v] for v in others), sum(q[v] for v in others)
        wanted = sum(p[v] * (p[v] / q[v]).log() for v in kept) + p_rest * (p_rest / q_rest).log()
        torch.testing.assert_close(value[n], wanted.detach())
        (gradient,) = torch.autograd.grad(wanted, new, retain_graph=True)
        torch.testing.assert_close(slope[n], gradient[n])
        whole = (p * (p / q).log()).sum()
        assert float(value[n]) <= float(whole.detach()) + 1e-12
    same, flat = top_kl(log_p, rest, old, index)
    torch.testing.assert_close(same, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(flat, torch.zeros(3, 7, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(logit_distance_sum(old, old)) == 0.0


@pytest.mark.parametrize("mode", ["er", "der", "der++"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_language_model_s_rows_are_trained_again(chat, tmp_path, mode, packing):
    module, data = chat_job(chat, tmp_path, data={"packing": packing, "batch_size": 4})
    technique = Replay(8, mode=mode, top_k=3)
    run = trainer(tmp_path, technique, LoRA(2), max_steps=3)
    run.fit(module, data)
    logged = {name: float(value) for name, value in run.callback_metrics.items() if "replay" in name}
    names = {"er": {"train/replay"}, "der": {"train/replay"}, "der++": {"train/replay", "train/replay/logits"}}[mode]
    assert set(logged) == names and all(value > 0 for value in logged.values())
    kept = technique._memory.buffer.groups[""]
    assert len(kept) == 8 and len({row["segments"][0]["row"] for row in kept}) == 8
    if mode != "er":
        assert all(row["top_logprob"].shape == (len(row["labels"]), 3) for row in kept)
        total = kept[0]["top_logprob"].exp().sum(1) + kept[0]["rest_logprob"].exp()
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("mode", ["er", "der++"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_at_once_or_in_pieces_the_training_is_the_same(chat, tmp_path, mode, packing):
    """(Padded rows are sorted within a window, so that another, equally likely, sample of them is kept.)"""
    outcomes = []
    for size, accumulate in ((4, 1), (2, 2)):
        module, data = chat_job(chat, tmp_path, data={"packing": packing, "batch_size": size})
        run = trainer(tmp_path, Replay(8, mode=mode, top_k=3), max_steps=3, accumulate_grad_batches=accumulate)
        run.fit(module, data)
        outcomes.append(state(module))
    for other in outcomes[1:]:
        for name, value in outcomes[0].items():
            torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-5)


def test_a_run_killed_in_the_third_task_goes_on_with_the_same_memory(tmp_path):
    """Memory and counters included; a file is saved after each step, and each of task c is resumed."""
    options = {"size": 7, "balance": "task"}
    whole, one = Layer(), Replay(**options)
    run_of(tmp_path, one, Hooks(), Saves(tmp_path, "batch")).fit(whole, stream())
    for number in (8, 9):
        again, other = Layer(), Replay(**options)
        run_of(tmp_path, other, Hooks()).fit(
            again, stream(), ckpt_path=tmp_path / f"batch-{number}.ckpt", weights_only=True
        )
        assert all(
            torch.equal(a, b) for a, b in zip(weights_of(whole).values(), weights_of(again).values(), strict=True)
        )
        mine, theirs = one.state_dict()["buffer"], other.state_dict()["buffer"]
        assert mine["seen"] == theirs["seen"] == {"a": 10, "b": 6, "c": 9}
        for group, kept in mine["groups"].items():
            for a, b in zip(kept, theirs["groups"][group], strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a["plain"], b["plain"], strict=True))


def test_a_baseline_leaves_it_out(tmp_path):
    plain, sitting = Layer(), Layer()
    run_of(tmp_path).fit(plain, stream())
    run_of(tmp_path, technique := Replay(5)).fit(sitting, stream(baseline="naive"))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain).values(), weights_of(sitting).values(), strict=True))
    assert technique.state_dict() == {}


def test_refusals(tmp_path):
    with pytest.raises(Refusal, match="PlainNet does not say its logits.*give it a method logits"):
        fit(tmp_path, PlainNet(), Replay(mode="der"))
    with pytest.raises(Refusal, match="Replay.size must be at least 1"):
        Replay(0)
    with pytest.raises(Refusal, match=r"Replay\.offer task waits for the end of a task, .* scenario free"):
        run_of(tmp_path, Replay(offer="task")).fit(Told(), stream(scenario="free"))


def test_kto_s_rows_cannot_be_kept_alone(chat, tmp_path):
    from lightning_ft import KTO, UnpairedPreferenceData

    file = tmp_path / "rated.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": " yes", "label": True}) + "\n" for n in range(4))
    )
    with pytest.raises(
        Refusal, match="Replay cannot work with a loss over mismatched answers .KTO., because a row is compared"
    ):
        trainer(tmp_path, Replay()).fit(KTO(str(chat / "model")), UnpairedPreferenceData(str(file)))
