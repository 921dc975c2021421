"""One data set that is cut into tasks: joint training on all of them with the masks of each, and what cannot be cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lightning_ft import Refusal, SFTData, TaskStream
from tests.data.test_task_stream_ours import CLASSES, Rows, data, fit, write
from tests.modules.tasks import write_base


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    write_base("bert", folder / "bert")
    write(folder)
    return folder


def test_in_joint_training_the_classes_of_each_row_s_own_task_compete(place, tmp_path):
    """Else joint, which should be above naive, would be judged by more classes than it."""
    seen: list[tuple[int, tuple[bool, ...]]] = []

    class Look(Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
            masks = map(tuple, batch.columns["class_mask"].tolist())
            seen.extend((int(target), mask) for target, mask in zip(batch.targets, masks, strict=True))

    groups = [["bad", "good"], ["fair"]]
    stream = TaskStream(source=data(place), by="class", groups=groups, scenario="task", baseline="joint")
    fit(place, tmp_path, stream, Look())
    assert {target for target, _ in seen} == {0, 1, 2}
    assert all(mask == ((False, True, False) if target == 1 else (True, False, True)) for target, mask in seen)
    assert stream.scores.rows["joint"]["fair"]["val/accuracy"] == 1.0, "of one class there is no doubt, as in naive"
    batch = next(iter(stream._parts["bad+good"].loader("val")))
    assert batch.columns["class_mask"].tolist() == [[True, False, True]] * len(batch.rows)


def test_in_joint_training_classes_of_no_task_do_not_compete(place, tmp_path):
    rows = Rows()
    stream = TaskStream(source=data(place), by="class", groups=["bad", "good"], scenario="class", baseline="joint")
    fit(place, tmp_path, stream, rows)
    assert rows.tasks == [("joint", (0, 2), (0, 2))] and set(map(tuple, rows.masks)) == {(True, False, True)}


def test_a_domain_without_rows_to_validate_on_has_an_empty_column(place, tmp_path):
    """What a module of ours measures of each loader is told from the next one's by the tasks that have rows."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    held_out = tmp_path / "val.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows if row["domain"] != "books"))
    source = data(place, val_fraction=0.0, val_path=str(held_out))
    stream = TaskStream(source=source, by="domain")
    _, run = fit(place, tmp_path, stream)
    matrix, start = stream.scores.matrix()
    assert stream.scores.columns() == ["films", "books", "tea"]
    assert all(row[1] is None and None not in (row[0], row[2]) for row in [*matrix, start]) and len(matrix) == 3
    assert matrix[-1][2] == pytest.approx(float(run.callback_metrics["val/accuracy/tea"]))
    assert float(run.callback_metrics["continual/average"]) == pytest.approx((matrix[-1][0] + matrix[-1][2]) / 2)


def test_refusals(place, tmp_path):
    with pytest.raises(Refusal, match="groups names the values of domain 'wine', and the training rows have 'films'"):
        fit(place, tmp_path, TaskStream(source=data(place), by="domain", groups=["wine"]))
    with pytest.raises(
        Refusal, match="TaskStream.by place: .*rows.jsonl has no such column; it has text, label, domain"
    ):
        fit(place, tmp_path, TaskStream(source=data(place), by="place"))
    with pytest.raises(Refusal, match="puts the classes 'bad' into two tasks"):
        fit(place, tmp_path, TaskStream(source=data(place), by="class", groups=[["bad", "bad"], ["fair"]]))
    with pytest.raises(Refusal, match="TaskStream needs to know how many rows a task has.*streams them"):
        TaskStream([SFTData("x.jsonl", streaming=True)])


def test_rows_to_be_judged_by_that_belong_to_no_task_are_refused(place, tmp_path):
    """Unless the user names what the tasks have; a value that one row lacks is told by its place."""
    for column in ("domain", "label"):
        file = tmp_path / f"no_{column}.jsonl"
        kept = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept if row[column] not in ("tea", "fair")))
        source = data(place, val_fraction=0.0, val_path=str(place / "rows.jsonl"), labels=CLASSES)
        source.path = str(file)
        by = "class" if column == "label" else column
        with pytest.raises(
            Refusal, match=rf"the val rows have {by} (tea|fair), which no training row has.*TaskStream.groups"
        ):
            fit(place, tmp_path, TaskStream(source=source, by=by))
    fit(place, tmp_path, TaskStream(source=source, by="class", groups=["bad", "good"]), max_steps=1)
    kept[4].pop("domain")
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    source = data(place)
    source.path = str(file)
    with pytest.raises(Refusal, match="there is no domain, by which TaskStream.by splits"):
        fit(place, tmp_path, TaskStream(source=source, by="domain"))
