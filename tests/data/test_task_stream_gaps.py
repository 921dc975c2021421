"""Streams in which something is missing: rows to validate on, rows to train on, what an earlier run has kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import AGEM, EWC, MAS, LwF, Refusal, Replay, SynapticIntelligence
from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.cli.report_parts.task_matrix import task_matrix
from lightning_ft.data.task_scores import MATRIX, read_matrix
from lightning_ft.data.task_stream import TaskStream
from tests.data.streams import EPOCHS, SIZES, Hooks, Layer, Points, stream, trainer

LOG = "lightning.pytorch.utilities.rank_zero"  # other tests turn it down


class Unmeasured(Points):
    """Points that are all trained on."""

    def val_dataloader(self) -> Any:
        return []


class Emptied(Points):
    """The same, where the loader is there and its data set has no rows."""

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), batch_size=4)


def some(unmeasured: str, kind: type[Points] = Unmeasured, **options: Any) -> TaskStream:
    tasks = {
        name: (kind if name in unmeasured else Points)(number, rows)
        for number, (name, rows) in enumerate(SIZES.items())
    }
    return TaskStream(tasks, **{"epochs": EPOCHS, **options})


@pytest.mark.parametrize("kind", [Unmeasured, Emptied])
def test_a_task_without_rows_to_validate_on_has_an_empty_column_and_no_part_in_the_means(
    tmp_path, caplog, kind
) -> None:
    whole, data, hooks = stream(), some("b", kind), Hooks()
    trainer(tmp_path / "whole").fit(Layer(), whole)
    run = trainer(tmp_path, hooks, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    with caplog.at_level(logging.INFO, logger=LOG):
        run.fit(Layer(), data)
    assert [call[:2] for call in hooks.calls[-2:]] == [["start", "c"], ["end", "c"]]
    assert caplog.text.count("TaskStream: nothing is measured of b, for want of rows to validate on") == 1
    full, start = whole.scores.matrix()
    rows, before = data.scores.matrix()
    assert data.scores.columns() == ["a", "b", "c"]
    assert rows == [[one[0], None, one[2]] for one in full] and before == [start[0], None, start[2]]
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("continual/")}
    (a0, _, _), (a1, _, c1), (a2, _, c2) = full
    wanted = {"average": (a2 + c2) / 2, "backward_transfer": a2 - a0, "forward_transfer": c1 - start[2]}
    wanted |= {"forgetting_first": a0 - a2, "forgetting_max": max(a0, a1) - a2}
    assert logged == pytest.approx({f"continual/{name}": value for name, value in wanted.items()}, abs=1e-6)
    _, names, columns, values = read_matrix(tmp_path / MATRIX)
    assert names == ["(start)", "a", "b", "c"] and columns == ["a", "b", "c"] and values == [before, *rows]
    assert (task_matrix([RunFiles(path=tmp_path)]) or "").count("<rect") == 8


def test_what_was_not_measured_stays_so_in_a_later_fit(tmp_path) -> None:
    run, first = trainer(tmp_path), some("b")
    run.fit(Layer(), first)
    run.save_checkpoint(tmp_path / "abc.ckpt")
    last = TaskStream({"d": Points(3, 8)}, continue_from=str(tmp_path / "abc.ckpt"))
    trainer(tmp_path).fit(Layer(), last)
    assert last.scores.columns() == ["a", "b", "c", "d"] and [row[1] for row in last.scores.matrix()[0]] == [None] * 4


def test_joint_training_is_measured_on_the_tasks_that_can_be(tmp_path) -> None:
    data, run = some("b", baseline="joint", epochs=1), trainer(tmp_path)
    run.fit(Layer(), data)
    (row,), _ = data.scores.matrix()
    assert row[1] is None and float(run.callback_metrics["continual/average"]) == pytest.approx((row[0] + row[2]) / 2)


@pytest.mark.filterwarnings("ignore:Total length of `list`")
def test_a_stream_of_which_nothing_is_measured_says_so(tmp_path, caplog) -> None:
    hooks = Hooks()
    with caplog.at_level(logging.INFO, logger=LOG):
        trainer(tmp_path, hooks).fit(Layer(), some("abc"))
    assert "no task has rows to validate on, so there is no matrix" in caplog.text
    assert [call[:2] for call in hooks.calls[-1:]] == [["end", "c"]]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=LOG):
        trainer(tmp_path, limit_val_batches=0).fit(Layer(), some("abc"))
        trainer(tmp_path).fit(Layer(), stream())
    assert "to validate on" not in caplog.text


class Logits(Layer):
    """Says its logits."""

    def logits(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])


class Rowless(Points):
    """A task whose data set has no rows."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), batch_size=4)


def test_a_task_without_training_rows_is_refused_before_any_is_trained(tmp_path) -> None:
    module = Layer()
    with pytest.raises(Refusal, match="TaskStream: the task b has no training rows"):
        trainer(tmp_path).fit(module, some("b", Rowless))
    with pytest.raises(Refusal, match="TaskStream: the task b has no training rows"):
        trainer(tmp_path).fit(module, some("b", Rowless, epochs=1, steps=3))
    with pytest.raises(Refusal, match=r"limit_train_batches 0.4 leaves nothing of the 2 batches of the task b"):
        trainer(tmp_path, limit_train_batches=0.4).fit(module, stream())
    assert module.seen == []
    trainer(tmp_path, limit_train_batches=0).fit(module, stream())


def test_a_trainer_that_has_trained_is_refused(tmp_path) -> None:
    """Its count of micro-batches goes on, so that the second stream would begin in its middle."""
    run, module, hooks = trainer(tmp_path), Layer(), Hooks()
    run.fit(module, TaskStream({"a": Points(0, 10)}))
    run.callbacks.append(hooks)
    with pytest.raises(Refusal, match="This Trainer has trained before .3 micro-batches.*make a new Trainer"):
        run.fit(module, TaskStream({"b": Points(1, 10), "c": Points(2, 8)}))
    assert hooks.calls == [] and len(module.seen) == 3


def test_early_stopping_is_refused_before_any_task_is_trained(tmp_path) -> None:
    module = Layer()
    with pytest.raises(
        Refusal, match=r"EarlyStopping stops the whole stream where val_acc no longer.*TaskStream.epochs"
    ):
        trainer(tmp_path, EarlyStopping("val_acc", mode="max")).fit(module, stream())
    assert module.seen == []
    trainer(tmp_path, EarlyStopping("val_acc", mode="max"), fast_dev_run=True).fit(module, stream())
    assert len(module.seen) == 1


def learned(folder: Path, *techniques: Callback, **options: Any) -> str:
    """The file of a run that has learned three tasks."""
    run = trainer(folder, *techniques)
    run.fit(Logits(), stream(**options))
    run.save_checkpoint(folder / "abc.ckpt")
    return str(folder / "abc.ckpt")


@pytest.mark.parametrize(
    "technique", [EWC(1e6, labels="all"), MAS(), SynapticIntelligence(), Replay(5), AGEM(5), LwF()]
)
def test_a_technique_that_has_kept_nothing_of_what_was_learned_is_refused(tmp_path, technique) -> None:
    """It would hold the model to nothing, and look as if it did."""
    kind, file = type(technique).__name__, learned(tmp_path)
    module = Logits()
    with pytest.raises(
        Refusal,
        match=rf"has learned a, b, c, and {kind}\[.*\] has kept nothing.*the file has no technique.*learn those tasks with {kind}",
    ):
        trainer(tmp_path, technique).fit(module, TaskStream({"d": Points(3, 8)}, continue_from=file))
    assert module.seen == []


def test_a_technique_of_another_name_is_told_which_there_are(tmp_path) -> None:
    file = learned(tmp_path, EWC(1.0, labels="all", name="old"), Replay(5))
    with pytest.raises(Refusal, match=r"EWC\[ewc\] has kept nothing.*the file has EWC\[old\]\); give EWC the name"):
        data = TaskStream({"d": Points(3, 8)}, continue_from=file)
        trainer(tmp_path, EWC(1.0, labels="all")).fit(Layer(), data)


def test_what_else_may_go_on_from_a_file(tmp_path) -> None:
    """A technique that knows of those tasks from elsewhere, a teacher among the references, a baseline, a run without tasks."""
    file = learned(tmp_path, EWC(1.0, labels="all", name="old"), LwF())
    for technique, options in (
        (EWC(1.0, labels="all", load_from=file), {}),
        (LwF(), {}),
        (MAS(), {"baseline": "naive"}),
    ):
        data = TaskStream({"d": Points(3, 8)}, continue_from=file, **options)
        trainer(tmp_path, technique).fit(Logits(), data)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Layer(), Points(3, 8))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    data = TaskStream({"d": Points(3, 8)}, continue_from=str(tmp_path / "plain.ckpt"))
    trainer(tmp_path, technique := EWC(1.0, labels="all")).fit(Layer(), data)
    assert technique._held.tasks == 1
