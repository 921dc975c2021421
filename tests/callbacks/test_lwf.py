"""LwF: the contract, its term against the formula in float64, its teacher, and language models with LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_ft import Attachment, LoRA, LwF, Refusal, TaskStream
from tests.contract import Case, checks_for
from tests.contract.subjects import chat_job, state, trainer
from tests.data.streams import Hooks, Layer, Points, Saves, stream
from tests.data.streams import trainer as run_of
from tests.data.streams import weights as weights_of

CASE = Case(LwF, small={"weight": 2.0}, idle={"weight": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


class Says(Layer):
    """A user's module with a dropout, which only the student may feel."""

    def __init__(self, rate: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(rate)
        self.net = nn.Sequential(nn.Dropout(dropout), self.net)

    def logits(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3)


class Watch(Callback):
    """The net before and after each step, and as it was when the last task ended."""

    def __init__(self) -> None:
        self.steps, self.teacher = [], None

    def on_task_end(self, run, module, task) -> None:
        self.teacher = copy.deepcopy(module.net).double().eval()

    def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
        self.steps.append([self.teacher, copy.deepcopy(module.net).double(), [t.clone() for t in batch]])

    def on_train_batch_end(self, run, module, *_) -> None:
        self.steps[-1].append(copy.deepcopy(module.net).double())


def term(student, teacher, x, temperature, classes):
    """The paper's formula with loops, as a mean over rows."""
    total = torch.zeros((), dtype=torch.float64)
    for row in x:
        h, z = student(row[None])[0], teacher(row[None])[0].detach()
        q = torch.stack([h[c] / temperature for c in classes]).exp()
        p = torch.stack([z[c] / temperature for c in classes]).exp()
        q, p = q / q.sum(), p / p.sum()
        total = total + sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(x)


@pytest.mark.parametrize(("scenario", "temperature"), [("domain", 2.0), ("class", 1.5)])
def test_each_step_is_that_of_the_formula(tmp_path, scenario, temperature):
    module, watch = Says(), Watch()
    if scenario == "class":

        class Sorted(Points):
            def points(self):
                x, _ = super().points().tensors
                return torch.utils.data.TensorDataset(x, torch.arange(len(x)) % 3)

        data = TaskStream(source=Sorted(0, 12), by="class", groups=[["0", "1"], ["2"]], scenario="class", epochs=2)
    else:
        data = stream()
    run_of(tmp_path, LwF(0.8, temperature=temperature), watch).fit(module, data)
    with_teacher = [step for step in watch.steps if step[0] is not None]
    assert 0 < len(with_teacher) < len(watch.steps)
    classes = [0, 1] if scenario == "class" else [0, 1, 2]
    for teacher, before, (x, y), after in watch.steps:
        loss = nn.functional.cross_entropy(before(x.double()), y)
        if teacher is not None:
            loss = loss + 0.8 * term(before, teacher, x.double(), temperature, classes)
        loss.backward()
        for a, b in zip(before.parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(b, a - 0.3 * a.grad, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_in_eval_mode_and_the_student_gets_a_gradient(tmp_path):
    """Trap 9: dropout in the teacher would make noise; a student under no_grad would learn nothing."""
    module = Says(dropout=0.5)
    seen = []

    class See(Says):
        def logits(self, batch):
            found = super().logits(batch)
            seen.append((self.training and self.net[0].training, found.requires_grad))
            return found

    module.__class__ = See
    run_of(tmp_path, LwF()).fit(module, stream())
    assert set(seen[::2]) == {(False, False)} and set(seen[1::2]) == {(True, True)}
    assert module.training and module.net[0].training


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_language_model_with_lora_is_held_by_its_own_factors_without_a_second_base(chat, tmp_path, packing):
    technique, lora = LwF(3.0), LoRA(4)
    module, data = chat_job(chat, tmp_path, data={"packing": packing})
    trainer(tmp_path, technique, lora, max_steps=2).fit(module, data)
    numbers = sum(p.numel() for p in module.parameters())
    snapshot = Attachment.of(module).references.snapshots["task end of lwf"]
    assert set(snapshot.tensors) == {n for n, p in module.named_parameters() if p.requires_grad} and not snapshot.off
    taught = copy.deepcopy(module.model)
    run = trainer(tmp_path, technique, lora, max_steps=1)
    run.fit(module, data)
    assert float(run.callback_metrics["train/lwf"]) == pytest.approx(0.0, abs=1e-5), "it starts as its teacher"
    run = trainer(tmp_path, LwF(3.0), lora, max_steps=2, max_epochs=5)
    Attachment.of(module).references.snapshots["task end of lwf"] = snapshot
    run.fit(module, data)
    assert sum(p.numel() for p in module.parameters()) == numbers
    # The logged value of the second step: T^2 KL over the scored tokens, by the whole logits of both.
    before = run.callback_metrics["train/lwf"]
    assert float(before) > 0
    del taught


def test_a_tokens_term_is_the_divergence_of_whole_logits(chat, tmp_path):
    module, data = chat_job(chat, tmp_path, data={"batch_size": 16})
    technique = LwF(1.0, temperature=2.0)
    trainer(tmp_path, technique, max_steps=1).fit(module, data)
    teacher = copy.deepcopy(module.model).eval()
    trainer(tmp_path, max_steps=2, max_epochs=2).fit(module, data)  # away from the teacher, without it
    student = copy.deepcopy(module.model)
    batches: list[Any] = []

    class Keep(Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx):
            batches.append(batch)

    run = trainer(tmp_path, technique, Keep(), max_steps=1)
    run.fit(module, data)
    (batch,) = batches
    view = type(module.view)
    with torch.no_grad():
        both = []
        for model in (teacher, student):
            hidden = view(model).hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask)
            both.append(view(model).logits(hidden.reshape(-1, hidden.shape[-1])[batch.scored]).double() / 2.0)
    p, q = (one.log_softmax(-1) for one in both)
    wanted = 4.0 * (p.exp() * (p - q)).sum(-1).mean()
    assert float(run.callback_metrics["train/lwf"]) == pytest.approx(float(wanted), rel=1e-4)


def test_a_run_resumed_in_the_third_task_ends_as_the_unbroken_one(tmp_path):
    whole = Says()
    run_of(tmp_path, LwF(), Hooks(), Saves(tmp_path, "batch", "validation")).fit(whole, stream())
    teacher = Attachment.of(whole).references.snapshots["task end of lwf"].tensors
    for file in ("batch-9", "validation-4", "batch-10", "validation-5"):
        again = Says()
        run_of(tmp_path, LwF(), Hooks()).fit(again, stream(), ckpt_path=tmp_path / f"{file}.ckpt", weights_only=True)
        assert all(
            torch.equal(a, b) for a, b in zip(weights_of(whole).values(), weights_of(again).values(), strict=True)
        )
        kept = Attachment.of(again).references.snapshots["task end of lwf"].tensors
        assert all(torch.equal(kept[name], value) for name, value in teacher.items()), file


def test_going_on_from_a_checkpoint_brings_the_teacher(tmp_path):
    """Two fits with continue_from end as one does."""
    whole, first, second = Says(), Says(), Says()
    run_of(tmp_path, LwF()).fit(whole, stream(epochs=1))
    tasks = stream().tasks
    run = run_of(tmp_path, LwF())
    run.fit(first, TaskStream({n: tasks[n] for n in "ab"}))
    run.save_checkpoint(tmp_path / "ab.ckpt")
    run_of(tmp_path, LwF()).fit(second, TaskStream(dict(tasks), continue_from=str(tmp_path / "ab.ckpt")))
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(second)[name], value, rtol=0, atol=0)
    assert state(second).keys() == state(whole).keys()


def test_refusals(tmp_path):
    with pytest.raises(Refusal, match="LwF acts between tasks, and a stream with scenario free"):
        run_of(tmp_path, LwF()).fit(Says(), stream(scenario="free"))
    with pytest.raises(Refusal, match="Layer does not say its logits"):
        run_of(tmp_path, LwF()).fit(Layer(), stream())
    with pytest.raises(Refusal, match="LwF.temperature must be greater than 0"):
        LwF(temperature=0)
