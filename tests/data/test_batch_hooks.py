"""A data module's own hooks around the transfer of a batch, within a stream of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ft import DPO, EWC, LoRA, Refusal, Replay
from lightning_ft.data.task_stream import TaskStream
from tests.callbacks.test_replayed_pairs import pairs, policy
from tests.contract.subjects import trainer as quiet
from tests.data.streams import EPOCHS, SIZES, Hooks, Layer, Points, trainer


class Hooked(Points):
    """Says which of its hooks was called on whose rows, and marks the rows in the last."""

    def __init__(self, *given: Any, calls: list[tuple[str, int, int]]) -> None:
        super().__init__(*given)
        self.calls = calls

    def note(self, hook: str, batch: Any) -> None:
        own = self.points().tensors[0][:, 0].tolist()
        self.calls.append((hook, self.seed, sum(value in own for value in batch[0][:, 0].tolist())))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.note("before", batch)
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.note("transfer", batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.note("after", batch)
        return [torch.cat([batch[0][:, :3], torch.full_like(batch[0][:, 3:], self.seed)], 1), batch[1]]


class Marked(Layer):
    """Notes the marks of what it trains and validates; has one hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.marks += [("train", mark) for mark in batch[0][:, 3].tolist()]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.marks += [("val", mark) for mark in batch[0][:, 3].tolist()]
        super().validation_step(batch, batch_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [torch.cat([batch[0][:, :3], torch.full_like(batch[0][:, 3:], 9.0)], 1), batch[1]]


def tasks(calls: list[tuple[str, int, int]], plain: str = "") -> dict[str, Points]:
    return {
        name: Points(number, rows) if name == plain else Hooked(number, rows, calls=calls)
        for number, (name, rows) in enumerate(SIZES.items())
    }


def batches(rows: int) -> int:
    return -(-rows // 4)


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_each_task_s_hooks_are_called_on_its_own_rows(tmp_path) -> None:
    """In training, in validation in the middle of an epoch too, and where an importance is measured."""
    calls: list[tuple[str, int, int]] = []
    module, stream = Marked(), TaskStream(tasks(calls), epochs=EPOCHS)
    run = trainer(tmp_path, EWC(1.0, labels="all"), val_check_interval=1)
    run.fit(module, stream)
    assert all(count in (1, 2, 4) for _, _, count in calls), "rows of its own, all of them"
    validations = sum(batches(n) * e for n, e in zip(SIZES.values(), EPOCHS, strict=True)) + 1
    for number, ((_, rows), epochs) in enumerate(zip(SIZES.items(), EPOCHS, strict=True)):
        wanted = batches(rows) * (epochs + 1 + validations)  # trained, asked by EWC, validated
        for hook in ("before", "transfer", "after"):
            assert sum(1 for called, seed, _ in calls if (called, seed) == (hook, number)) == wanted, (hook, number)
    for split, times in (("train", EPOCHS), ("val", [validations] * 3)):
        seen = [mark for kind, mark in module.marks if kind == split]
        assert [seen.count(float(n)) for n in range(3)] == [n * t for n, t in zip(SIZES.values(), times, strict=True)]
    assert "on_after_batch_transfer" not in stream.__dict__


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_where_a_task_has_no_hook_the_module_s_own_is_called(tmp_path) -> None:
    module = Marked()
    trainer(tmp_path).fit(module, TaskStream(tasks([], plain="b"), epochs=EPOCHS))
    assert [("train", n) in module.marks for n in (0.0, 1.0, 2.0, 9.0)] == [True, False, True, True]


def test_replayed_rows_pass_no_hook_again(tmp_path) -> None:
    calls: list[tuple[str, int, int]] = []

    class Adds(Hooked):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 100, batch[1]]

    module = Layer()
    given = {name: Adds(number, rows, calls=calls) for number, (name, rows) in enumerate(SIZES.items())}
    trainer(tmp_path, Replay(9)).fit(module, TaskStream(given))
    values = [value for rows in module.seen for value in rows]
    assert len(module.seen) > 10 and min(values) > 90 and max(values) < 110


def test_one_data_set_that_is_cut_keeps_its_hooks(tmp_path) -> None:
    calls: list[tuple[str, int, int]] = []
    stream = TaskStream(source=Hooked(0, 20, calls=calls), by="class", scenario="class")
    run = trainer(tmp_path, hooks := Hooks(), limit_val_batches=0)
    run.fit(Layer(), stream)
    assert len(hooks.calls) == 6 and len(calls) == 3 * run.global_step > 9
    assert all(seed == 0 and count for _, seed, count in calls)


def test_hooks_of_one_task_cannot_meet_batches_of_all(tmp_path) -> None:
    with pytest.raises(
        Refusal,
        match="baseline joint has batches of rows of all tasks, and on_before_batch_transfer is one of Hooked alone",
    ):
        trainer(tmp_path).fit(Layer(), TaskStream(tasks([]), baseline="joint"))


@pytest.mark.parametrize("baseline", [None, "joint"])
def test_pairs_in_a_stream_find_what_was_precomputed(chat, tmp_path, baseline) -> None:
    """Our own pairs ask the module by such a hook for what it knows of them."""
    found: list[bool] = []

    class Look(DPO):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found.append("reference_logps" in batch.columns)
            return super().training_step(batch, batch_idx)

    module: LightningModule = policy(chat, reference_policy="precomputed", reference_cache=str(tmp_path / "known"))
    module.__class__ = Look
    data = TaskStream({"a": pairs(tmp_path, "a"), "b": pairs(tmp_path, "b", " sure")}, baseline=baseline)
    quiet(tmp_path, LoRA(2), max_steps=-1, max_epochs=-1, limit_val_batches=0).fit(module, data)
    assert found == [True] * 6
