"""AGEM: the contract, the projection against its formula, and what it does to training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_ft import AGEM, EWC, LoRA, TaskStream
from lightning_ft.data.batch_rows import batch_of
from lightning_ft.functional.gradient_projection import dot, project_
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, chat_job, fit, trainer
from tests.data.streams import Hooks, Layer, Points, Saves, stream
from tests.data.streams import trainer as run_of
from tests.data.streams import weights as weights_of

CASE = Case(
    AGEM,
    small={"size": 6},
    known={
        "idle": "a memory of at least one row projects as soon as a gradient disagrees; there is no strength to set to 0"
    },
)


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def test_the_projection_is_the_formula_and_the_nearest_that_does_no_harm():
    drawn = torch.Generator().manual_seed(0)
    for _ in range(50):
        g, ref = (torch.randn(9, generator=drawn, dtype=torch.float64) for _ in range(2))
        pieces, refs = [g[:4].clone(), g[4:].reshape(5, 1).clone()], [ref[:4], ref[4:].reshape(5, 1)]
        project_(pieces, refs, dot(pieces, refs), dot(refs, refs))
        found = torch.cat([piece.reshape(-1) for piece in pieces])
        product = float(sum(a * b for a, b in zip(g, ref, strict=True)))
        wanted = g if product >= 0 else g - product / float((ref**2).sum()) * ref
        torch.testing.assert_close(found, wanted)
        assert float(found @ ref) >= -1e-12
        for _ in range(20):  # no other vector that does no harm is nearer to g
            other = torch.randn(9, generator=drawn, dtype=torch.float64)
            other = other if float(other @ ref) >= 0 else -other
            assert float((found - g).norm()) <= float((other - g).norm()) + 1e-12


class Steps(Callback):
    """Weights before each step, its rows and the memory's, and the gradient that was stepped with."""

    def __init__(self, technique: AGEM) -> None:
        self.technique, self.seen = technique, []

    def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
        task = getattr(run.datamodule, "task", None)
        drawn = self.technique._memory.buffer.draw(len(batch[0]), 2 * run.global_step, task.name if task else None)
        self.seen.append([copy.deepcopy(module.net).double(), [t.clone() for t in batch], copy.deepcopy(drawn)])

    def on_before_zero_grad(self, *_) -> None:
        pass

    def on_train_batch_end(self, run, module, *_) -> None:
        self.seen[-1].append([p.grad.double().clone() for p in module.net.parameters()])
        self.seen[-1].append(float(run.callback_metrics["train/agem"]))


def gradient(net, x, y):
    loss = nn.functional.cross_entropy(net(x.double()), y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))])


def test_in_a_stream_each_gradient_is_projected_on_rows_of_earlier_tasks_alone(tmp_path):
    technique, module = AGEM(30), Layer(0.3)
    steps = Steps(technique)
    run_of(tmp_path, technique, steps).fit(module, stream(epochs=[3, 3, 3], measure_start=False))
    projected = 0
    for net, (x, y), drawn, after, logged in steps.seen:
        g = gradient(net, x, y)
        if drawn:
            ref = gradient(net, *batch_of(drawn))
            product = g @ ref
            assert logged == float(product < 0)
            if product < 0:
                projected += 1
                g = g - product / (ref @ ref) * ref
            assert float(torch.cat([a.reshape(-1) for a in after]) @ ref) > -1e-6
        torch.testing.assert_close(torch.cat([a.reshape(-1) for a in after]), g, rtol=1e-4, atol=1e-6)
    assert [bool(drawn) for _, _, drawn, _, _ in steps.seen] == [False] * 9 + [True] * 15
    assert 0 < projected < 15


def test_clipping_comes_after_it(tmp_path):
    """The norm that is clipped is that of the projected gradient, which is smaller than the step's own."""
    technique, module, most = AGEM(30), Layer(0.3), 0.5
    steps = Steps(technique)
    options = {"gradient_clip_val": most}
    run_of(tmp_path, technique, steps, **options).fit(module, stream(epochs=[3, 3, 3], measure_start=False))
    told = 0
    for net, (x, y), drawn, after, _ in steps.seen:
        g = own = gradient(net, x, y)
        if drawn and (product := g @ (ref := gradient(net, *batch_of(drawn)))) < 0:
            g = g - product / (ref @ ref) * ref
            told += float(own.norm()) > most
        g = g * min(1.0, most / float(g.norm()))
        torch.testing.assert_close(torch.cat([a.reshape(-1) for a in after]), g, rtol=1e-4, atol=1e-6)
    assert told


def test_it_comes_before_penalties(tmp_path):
    """With EWC beside it the penalty is added to the projected gradient, whatever the order of the callbacks."""
    ends = []
    for order in (0, 1):
        module = Layer(0.3)
        both = [AGEM(30), EWC(50.0)]
        run_of(tmp_path, *(both if order else both[::-1])).fit(module, stream())
        ends.append(weights_of(module))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def test_a_language_model_with_lora(chat, tmp_path):
    module, data = chat_job(chat, tmp_path, data={"batch_size": 4})
    run = trainer(tmp_path, AGEM(8), LoRA(2), max_steps=3)
    run.fit(module, data)
    assert float(run.callback_metrics["train/agem"]) in (0.0, 1.0)


def test_a_run_resumed_in_the_third_task_ends_as_the_unbroken_one(tmp_path):
    whole = Layer(0.3)
    run_of(tmp_path, AGEM(7), Hooks(), Saves(tmp_path, "batch")).fit(whole, stream())
    again = Layer(0.3)
    run_of(tmp_path, AGEM(7), Hooks()).fit(again, stream(), ckpt_path=tmp_path / "batch-9.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole).values(), weights_of(again).values(), strict=True))


def test_without_disagreement_nothing_changes(tmp_path):
    """Rows that are all alike never disagree."""

    class Alike(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step([torch.ones_like(batch[0]), torch.zeros_like(batch[1])], batch_idx)

    plain, with_it = Alike(), Alike()
    fit(tmp_path, plain)
    fit(tmp_path, with_it, AGEM(6))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), with_it.parameters(), strict=True))


class Plain(Layer):
    """Steps by the gradient alone, which shows what was projected."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


def projected(folder: str, devices: int = 1, rows: int | None = None) -> dict[str, Any]:
    """Three tasks of rows that divide by four, four a step over all ranks: which steps were projected, and the weights."""
    torch.set_num_threads(1)
    technique, module, marks = AGEM(30, rows=rows), Plain(0.5), []

    class Look(Callback):
        def on_train_batch_end(self, run, module, *_) -> None:
            marks.append(technique._projected)

    tasks = {
        name: Points(number, n, 4 // devices) for number, (name, n) in enumerate({"a": 12, "b": 8, "c": 16}.items())
    }
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    run = run_of(folder, technique, Look(), limit_val_batches=0, **options)
    run.fit(module, TaskStream(tasks, epochs=3))
    return {"marks": marks, "weights": weights_of(module)}


@pytest.mark.parametrize("rows", [None, 1], ids=["as_many_as_a_step", "one_row_for_two_ranks"])
def test_two_ranks_project_what_one_process_does_with_the_joint_batch(tmp_path, two_ranks, rows):
    one = projected(str(tmp_path / "one"), rows=rows)
    assert 0 < sum(one["marks"]) < len(one["marks"]) - 9, "some steps that could be projected are, and some are not"
    for other in two_ranks.run("tests.callbacks.test_agem:projected", folder=str(tmp_path), devices=2, rows=rows):
        assert other["marks"] == one["marks"]
        for name, value in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], value, rtol=1e-4, atol=1e-5)
