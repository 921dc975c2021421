"""One data set cut into tasks: by the class of its rows, or by what stands in a column, such as a domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_ft.data.labelled_rows import LabelledRows
from lightning_ft.data.mixture import mixed
from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.task_parts import Rows, parts_of
from lightning_ft.functional.errors import Refusal

Groups = int | list[list[str]] | list[list[int]] | list[str] | list[int]
"""Classes a task; or the values of each task; or one value a task."""


@dataclass(frozen=True)
class Group:
    """The values whose rows make a task.

    Attributes:
        name: of the task.
        values: as they stand in the data (numbers of classes where rows are split by class).
    """

    name: str
    values: tuple[Any, ...]


def groups_of(found: Sequence[Any], given: Groups | None, shown: dict[Any, str], what: str) -> list[Group]:
    """Which values make which task.

    Args:
        found: the distinct values, in the order in which tasks are to come where nothing is given.
        given: what the user wants; None: each value is a task.
        shown: value -> how the user writes it.
        what: they are, for messages.

    Raises:
        Refusal: values that do not exist, or stand in two tasks; fewer than one a task.
    """
    values = list(found)
    if isinstance(given, int):
        if given < 1:
            raise Refusal(f"TaskStream.groups must be at least 1 {what} a task, got {given}.")
        chosen = [values[i : i + given] for i in range(0, len(values), given)]
    elif given is None:
        chosen = [[value] for value in values]
    else:
        by_name = {str(name): value for value, name in shown.items()}
        chosen = []
        for entry in given:
            names = entry if isinstance(entry, list) else [entry]
            unknown = [name for name in names if str(name) not in by_name]
            if unknown or not names:
                raise Refusal(
                    f"TaskStream.groups names the {what} {unknown[0] if unknown else '(none)'!r}, and the training rows have "
                    f"{', '.join(map(repr, by_name))}; name those, each in one task."
                )
            chosen.append([by_name[str(name)] for name in names])
    flat = [value for group in chosen for value in group]
    if len(set(flat)) < len(flat):
        twice = next(value for value in flat if flat.count(value) > 1)
        raise Refusal(f"TaskStream.groups puts the {what} {shown[twice]!r} into two tasks; name it in one.")
    return [Group("+".join(str(shown[value]) for value in group), tuple(group)) for group in chosen]


def planned_keys(data: PlannedData, split: Split, by: str) -> list[np.ndarray]:
    """What each row of a split is split by, file by file.

    Args:
        data: set up.
        split: which.
        by: ``class`` or the name of a column.

    Raises:
        Refusal: rows that have no class, or a file without the column.
    """
    keys = []
    for part, file in zip(parts_of(data._rows[split]), data._files(split), strict=True):
        if by == "class":
            if not (isinstance(part, LabelledRows) and part.asked.task == "sequence_classification") or (
                part.asked.multi_label
            ):
                raise Refusal(
                    "TaskStream.by class needs rows with one class each, as ClassificationData reads them; name a column."
                )
            keys.append(part.classes())
            continue
        source = data._source(file)
        column = source.column(by)
        if by not in source.columns and not any(value is not None for value in column):
            raise Refusal(_no_column(by, source.name, source.columns))
        values = [column[row] for row in part.index.tolist()]
        if any(value is None for value in values):
            row = next(int(r) for r, value in zip(part.index, values, strict=True) if value is None)
            raise Refusal(
                f"{data._source(file).where(row)}: there is no {by}, by which TaskStream.by splits; give one."
            )
        keys.append(np.array([str(value) for value in values], dtype=object))
    return keys


def planned_rows(data: PlannedData, by: str, groups: Sequence[Group]) -> list[dict[Split, Rows]]:
    """The rows of each task by split; a split in which a task has no rows is not there.

    Raises:
        Refusal: a task without training rows.
    """
    tasks: list[dict[Split, Rows]] = [{} for _ in groups]
    for split in data._rows:
        keys = planned_keys(data, split, by)
        parts = parts_of(data._rows[split])
        for group, task in zip(groups, tasks, strict=True):
            places = [np.flatnonzero(np.isin(key, group.values)) for key in keys]
            if any(len(place) for place in places):
                # A file without a row of this task stays, empty: its place in the list says what it is.
                task[split] = mixed([part.subset(place) for part, place in zip(parts, places, strict=True)])
    for group, task in zip(groups, tasks, strict=True):
        if "train" in data._rows and "train" not in task:
            raise Refusal(f"TaskStream: the task {group.name} has no training rows.")
    return tasks


def _no_column(by: str, where: str, columns: Sequence[str]) -> str:
    there = f"it has {', '.join(columns)}" if columns else "it has no names of columns"
    return f"TaskStream.by {by}: {where} has no such column; {there}. Name one of these, or class."


def refuse_unlearned(
    by: str, trained: Sequence[Any], others: Mapping[Split, Sequence[Any]], shown: dict[Any, str]
) -> None:
    """Refuses rows to be judged by that no task would have, because no training row is like them.

    Args:
        by: what is split by.
        trained: the values of the training rows.
        others: split -> the values of its rows.
        shown: value -> how the user writes it; others as they are.

    Raises:
        Refusal: with these values.
    """
    for split, values in others.items():
        extra = [shown.get(value, str(value)) for value in values if value not in set(trained)]
        if extra:
            raise Refusal(
                f"TaskStream: the {split} rows have {by} {', '.join(extra)}, which no training row has, so that no task would be "
                "judged by them; leave these rows out, or name in TaskStream.groups what is to be learned."
            )


def distinct(keys: Sequence[np.ndarray]) -> list[Any]:
    """The distinct values in the order in which they come."""
    return list(dict.fromkeys(value for key in keys for value in key.tolist()))


def plain_keys(loader: DataLoader[Any], by: str) -> np.ndarray:
    """What each row of a map-style data set is split by: its target for ``class``, else its column.

    Raises:
        Refusal: a data set that says neither.
    """
    dataset = loader.dataset
    if isinstance(dataset, Subset):
        whole = plain_keys(DataLoader(dataset.dataset), by)
        return whole[np.asarray(dataset.indices)]
    if by != "class":
        if by in getattr(dataset, "column_names", ()):
            return np.array([str(value) for value in dataset[by]], dtype=object)  # type: ignore[index]
        raise Refusal(
            _no_column(by, f"the data set {type(dataset).__name__}", list(getattr(dataset, "column_names", ())))
        )
    targets = getattr(dataset, "targets", None)
    if targets is None and isinstance(dataset, TensorDataset):
        targets = dataset.tensors[-1]
    if targets is None:
        raise Refusal(
            f"TaskStream.by class: the data set {type(dataset).__name__} has no attribute targets; give it one, (rows,) classes."
        )
    return np.asarray(targets)


__all__ = ["Group", "Groups", "distinct", "groups_of", "plain_keys", "planned_keys", "planned_rows", "refuse_unlearned"]
