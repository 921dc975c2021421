"""What a task stream was given as its tasks: data modules one by one, or one of them cut; and all of them together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np

from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.task_parts import JointTask, PlainTask, PlannedTask, joint_plain, plain_loaders
from lightning_ft.data.task_split import (
    Group,
    Groups,
    distinct,
    groups_of,
    plain_keys,
    planned_keys,
    planned_rows,
    refuse_unlearned,
)
from lightning_ft.functional.errors import Refusal

_JUDGED: tuple[Split, ...] = ("val", "test")
Running = Callable[[], pl.Trainer | None]
"""Gives the Trainer of the run; None before it."""


@dataclass(frozen=True)
class Cut:
    """One task.

    Attributes:
        name: of the task.
        rows: of it.
        classes: numbers of the classes of its training rows; None where they have none, or nobody knows.
    """

    name: str
    rows: PlannedTask | PlainTask
    classes: tuple[int, ...] | None


def cut_tasks(
    modules: Mapping[str, pl.LightningDataModule], labels: list[str] | None, trainer: Running
) -> Iterator[Cut]:
    """Each data module as a task.

    Args:
        modules: by name, set up.
        labels: names of the classes of all tasks.
        trainer: of the run.
    """
    for name, data in modules.items():
        if isinstance(data, PlannedData):
            ours = _relabelled(data, labels, trainer())
            yield Cut(name, PlannedTask(ours, ours._rows), _classes_of(ours))
        else:
            loaders = plain_loaders(data, name)
            every: dict[Split, np.ndarray] = {
                split: np.arange(len(loader.dataset))  # type: ignore[arg-type]
                for split, loader in loaders.items()
            }
            yield Cut(name, PlainTask(loaders, every, trainer), None)


def cut_source(data: pl.LightningDataModule, by: str, given: Groups | None, trainer: Running) -> Iterator[Cut]:
    """One data module in several tasks.

    Args:
        data: set up.
        by: ``class`` or a column.
        given: which values make which task.
        trainer: of the run.

    Raises:
        Refusal: rows that do not say what they are to be cut by.
    """
    if not isinstance(data, PlannedData):
        yield from _cut_plain(data, by, given, trainer)
        return
    if isinstance(data.path, dict):
        raise Refusal("TaskStream.source with weighted files cannot be cut: give path as a list.")
    split: Split = "train" if "train" in data._rows else next(iter(data._rows))
    names = data.label_names() if by == "class" and hasattr(data, "label_names") else None
    found = {
        name: distinct(planned_keys(data, name, by)) for name in dict.fromkeys([split, *_JUDGED]) if name in data._rows
    }
    if "train" in found:
        _refuse_unlearned(by, given, found, names)
    groups = _groups(found[split], by, given, names)
    for group, rows in zip(groups, planned_rows(data, by, groups), strict=True):
        task = PlannedTask(data, rows)
        yield Cut(group.name, task, _classes_of(task.data))


def _cut_plain(data: pl.LightningDataModule, by: str, given: Groups | None, trainer: Running) -> Iterator[Cut]:
    loaders = plain_loaders(data, "source")
    keys = {split: plain_keys(loader, by) for split, loader in loaders.items()}
    found = {split: distinct([key]) for split, key in keys.items()}
    _refuse_unlearned(by, given, found, None)
    for group in _groups(found["train"], by, given, None):
        rows = {split: np.flatnonzero(np.isin(key, group.values)) for split, key in keys.items()}
        rows = {split: places for split, places in rows.items() if len(places)}
        mine = {split: loader for split, loader in loaders.items() if split in rows}
        classes = tuple(sorted(int(value) for value in group.values)) if by == "class" else None
        yield Cut(group.name, PlainTask(mine, rows, trainer), classes)


def _refuse_unlearned(by: str, given: Groups | None, found: dict[Split, list[Any]], names: list[str] | None) -> None:
    """Where the user names what each task has, other rows are left out on purpose."""
    if given is None or isinstance(given, int):
        shown = {} if names is None else dict(enumerate(names))
        judged = {split: found[split] for split in _JUDGED if split in found}
        refuse_unlearned(by, found["train"], judged, shown)


def _groups(found: list[Any], by: str, given: Groups | None, names: list[str] | None) -> list[Group]:
    if by == "class":
        found = sorted(found)
    shown = {value: names[int(value)] if names is not None else str(value) for value in found}
    return groups_of(found, given, shown, "classes" if by == "class" else f"values of {by}")


def _relabelled(data: PlannedData, labels: list[str] | None, trainer: pl.Trainer | None) -> PlannedData:
    """The data with the class numbers of all tasks together."""
    own = data.label_names() if hasattr(data, "label_names") else None
    if labels is None or own == labels:
        return data
    other: Any = copy.copy(data)
    other.labels, other._asked, other._answers, other._rows = labels, None, {}, {}
    fn = trainer.state.fn if trainer is not None else None
    other.setup(fn.value if fn is not None else None)
    found: PlannedData = other
    return found


def _classes_of(data: PlannedData) -> tuple[int, ...] | None:
    """Numbers of the classes of the training rows."""
    counted = getattr(data, "class_counts", None)
    if not callable(counted) or "train" not in data._rows or data.resolved_task() == "regression":  # type: ignore[attr-defined]
        return None
    return tuple(number for number, count in enumerate(counted()) if count)


def joined(parts: Sequence[PlannedTask | PlainTask], trainer: Running) -> PlannedTask | PlainTask:
    """The training rows of all tasks as one.

    Raises:
        Refusal: tasks that cannot be dealt together.
    """
    ours = [part for part in parts if isinstance(part, PlannedTask)]
    plain = [part for part in parts if isinstance(part, PlainTask)]
    return JointTask(ours) if len(ours) == len(parts) else joint_plain(plain, len(parts), trainer)


__all__ = ["Cut", "cut_source", "cut_tasks", "joined"]
