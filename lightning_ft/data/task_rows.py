"""Rows of several tasks as one data set: which come in an epoch, and a batch in which they lie beside one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch

from lightning_ft.data.collate import FILLER, Layout, Segment, joined, real_rows, targets_of
from lightning_ft.data.collate_labelled import LabelledSegment
from lightning_ft.data.collate_pairs import PairSegment
from lightning_ft.data.loader import Placement, PlannedLoader
from lightning_ft.data.plan import Plan, count_units, micro_batches
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.task_sampling import rows_in_tasks, task_sequence


class Part(Protocol):
    """The rows of one task: `TokenRows` or `MixedRows`; a pair of answers is one row."""

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens."""

    @property
    def scored(self) -> np.ndarray:
        """(rows,) scored tokens."""

    def __len__(self) -> int:
        """Rows."""

    def segments(self, numbers: Sequence[int] | np.ndarray) -> Sequence[Segment]:
        """The rows at these places."""


@dataclass(frozen=True)
class TaskSegment(Segment):
    """A row of a task.

    Attributes:
        task: its number.
        inner: the row as its own data module gives it.
    """

    task: int
    inner: Segment


@dataclass(frozen=True)
class TaskRows:
    """The rows of all tasks one after the other, as a loader sees them.

    Attributes:
        parts: task -> its rows, in the order of the tasks' numbers.
    """

    parts: Mapping[str, Part]

    def __len__(self) -> int:
        return int(self._begins[-1])

    @property
    def sizes(self) -> list[int]:
        """Rows of each task."""
        return [len(part) for part in self.parts.values()]

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""
        return np.concatenate([part.lengths for part in self.parts.values()])

    @property
    def widths(self) -> np.ndarray:
        """(rows,) the same: a row is one sequence."""
        return self.lengths

    @property
    def copies(self) -> int:
        """Sequences a row."""
        return 1

    @cached_property
    def units(self) -> dict[str, np.ndarray]:
        """``token`` and ``row``, and both of each task: ``row:NAME`` counts its rows, ``token:NAME`` its scored tokens."""
        scored = np.concatenate([part.scored for part in self.parts.values()])
        owner = np.repeat(np.arange(len(self.parts)), self.sizes)
        units = {"token": scored, "row": np.ones(len(self), dtype=np.int64)}
        for k, name in enumerate(self.parts):
            units |= {f"row:{name}": (owner == k).astype(np.int64), f"token:{name}": scored * (owner == k)}
        return units

    def numbers(self, tasks: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(N,) places of rows that are given by task and row of it."""
        return self._begins[tasks] + rows

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[TaskSegment]:
        """The rows at these places; `Segment.row` is the place."""
        found, parts = [], list(self.parts.values())
        for number in np.asarray(numbers, dtype=np.int64).tolist():
            task = int(np.searchsorted(self._begins, number, side="right")) - 1
            (inner,) = parts[task].segments([number - int(self._begins[task])])
            found.append(TaskSegment(ids=inner.ids, spans=inner.spans, row=number, task=task, inner=inner))
        return found


@dataclass(frozen=True)
class Draw:
    """Which rows an epoch takes, task by task.

    Attributes:
        rows_of: the data set.
        count: rows an epoch.
        chances: epoch -> (K,) probabilities.
        in_turn: whether tasks come in turn.
    """

    rows_of: TaskRows
    count: int
    chances: Callable[[int], np.ndarray]
    in_turn: bool = False

    def __len__(self) -> int:
        return self.count

    def tasks(self, places: int, *, seed: int, epoch: int) -> np.ndarray:
        """(places,) the task of each place of an epoch."""
        return task_sequence(self.chances(epoch), places, seed=seed, epoch=epoch, in_turn=self.in_turn)

    def rows(self, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """(count,) row numbers of an epoch in which each place draws a task of its own."""
        return self.at(self.tasks(self.count, seed=seed, epoch=epoch), seed=seed, epoch=epoch, shuffle=shuffle)

    def at(self, tasks: np.ndarray, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """(N,) row numbers where the tasks are given."""
        return self.rows_of.numbers(
            tasks, rows_in_tasks(tasks, self.rows_of.sizes, seed=seed, epoch=epoch, shuffle=shuffle)
        )


class OneTaskLoader(PlannedLoader):
    """Deals micro-batches of one task each, the same task on all ranks."""

    def plan(self, placement: Placement | None = None) -> Plan:
        """The plan of the current epoch: a task for each micro-batch, then its next rows for all ranks."""
        place, draw = placement or self.placement(), cast("Draw", self.shares)
        per_step = self.batch_size * place.world_size
        steps = micro_batches(len(draw), batch_size=self.batch_size, world_size=place.world_size)
        tasks = np.repeat(draw.tasks(steps, seed=self.seed, epoch=self.epoch), per_step)
        rows = draw.at(tasks, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        micro = []
        for begin in range(0, len(rows), per_step):
            window = rows[begin : begin + per_step]
            if not self.packed:
                window = window[np.argsort(self.dataset.lengths[window], kind="stable")]
            micro.append(list(np.array_split(window, place.world_size)))
        return Plan(micro[: place.limit], place.accumulate, count_units(micro[: place.limit], self.dataset.units))


@dataclass(frozen=True)
class TaskCollate:
    """Makes a batch of rows of several tasks: laid out once, so that the trunk runs once.

    ``columns`` of the batch say whose what is: ``task`` (S,) the number of each row's task, -1 for a filler; for each task k that
    has any ``rows/k`` (its rows among the S), ``targets/k`` (their classes, values or 0/1 for several classes), ``scored/k`` (its
    places among the N scored tokens). A pair of answers lies there as two rows, the better one first, each behind the whole
    prompt, and counts as one; ``margin/k`` (P,) where pairs have margins.

    Attributes:
        names: of the tasks.
        by_token: those that score tokens.
        paired: those of pairs of answers.
    """

    names: tuple[str, ...]
    by_token: frozenset[str] = field(default=frozenset())
    paired: frozenset[str] = field(default=frozenset())

    def __call__(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """One micro-batch; no segments give a filler batch."""
        dealt = list(cast("Sequence[TaskSegment]", segments)) or [replace(_FILLER)]
        rows = [half for row in dealt for half in _halves(row)]
        layout = Layout.of([len(row.ids) for row in rows], packed=packed)
        marks = [_marks(row.inner) for row in rows]
        scored, owner = layout.flat([at for at, _ in marks])
        (numbers, _), (_, real) = real_rows(rows), real_rows(dealt)
        of_row = torch.tensor([row.task for row in rows])
        columns, counts = {"task": of_row}, {"token": float(len(scored)), "row": real}
        of_scored = of_row[owner]
        for k, name in enumerate(self.names):
            mine, places = (of_row == k).nonzero()[:, 0], (of_scored == k).nonzero()[:, 0]
            counts |= {f"row:{name}": float(sum(row.task == k for row in dealt)), f"token:{name}": float(len(places))}
            if not len(mine):
                continue
            columns[f"rows/{k}"] = mine
            if name in self.by_token or name in self.paired:
                columns[f"scored/{k}"] = places
            if name in self.paired:
                margins = [cast("PairSegment", row.inner).margin for row in dealt if row.task == k]
                if margins[0] is not None:
                    columns[f"margin/{k}"] = torch.tensor(margins, dtype=torch.float32)
            elif name not in self.by_token:
                targets = [cast("LabelledSegment", rows[int(n)].inner).target for n in mine]
                columns[f"targets/{k}"] = torch.from_numpy(np.stack(cast("list[np.ndarray]", targets)))
        types: list[Any] = [getattr(row.inner, "types", None) for row in rows]
        filled = [
            np.zeros(len(row.ids), dtype=np.int64) if t is None else t for row, t in zip(rows, types, strict=True)
        ]
        return Batch(
            ids=layout.fill([row.ids for row in rows]),
            positions=layout.positions(),
            bounds=layout.bounds,
            mask=layout.mask(),
            scored=scored,
            labels=joined([labels for _, labels in marks]),
            segment_of_scored=owner,
            rows=numbers,
            counts=counts,
            window=window,
            task=task,
            types=layout.fill(filled) if any(t is not None for t in types) else None,
            columns=columns,
        )


def _halves(row: TaskSegment) -> list[TaskSegment]:
    """The row; of a pair its prompt with each answer."""
    if not isinstance(row.inner, PairSegment):
        return [row]
    pair = row.inner
    ids = np.concatenate([pair.ids[: pair.prompt], pair.rejected.ids])
    rejected = Segment(ids=ids, spans=pair.rejected.spans + pair.prompt, row=pair.row)
    chosen = Segment(ids=pair.ids, spans=pair.spans, row=pair.row)
    return [
        TaskSegment(ids=one.ids, spans=one.spans, row=row.row, task=row.task, inner=one) for one in (chosen, rejected)
    ]


def _marks(row: Segment) -> tuple[np.ndarray, np.ndarray]:
    """(N,) places whose hidden state predicts, and (N,) what: the next token, or the class of a word."""
    if isinstance(row, LabelledSegment):
        return row.at, row.classes
    targets = targets_of(row)
    return targets - 1, row.ids[targets]


_FILLER = TaskSegment(ids=FILLER.ids, spans=FILLER.spans, row=-1, task=-1, inner=FILLER)
