"""Rows of token ids with spans -> :class:`~lightning_ft.engine.batch.Batch`, packed end to end or padded right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightning_ft.engine.batch import Batch


@dataclass(frozen=True)
class Segment:
    """One tokenised row.

    Attributes:
        ids: (T,) token ids.
        spans: (K, 2) [start, end) of the tokens to learn, ascending and disjoint.
        row: its number in the data set, -1 for a filler.
    """

    ids: np.ndarray
    spans: np.ndarray
    row: int


# A rank without rows still takes part in the step: two tokens (the shortest row any architecture runs), none scored.
FILLER = Segment(ids=np.zeros(2, dtype=np.int64), spans=np.empty((0, 2), dtype=np.int64), row=-1)


def targets_of(segment: Segment) -> np.ndarray:
    """(N,) positions of the scored tokens: those in a span, except position 0, which nothing predicts."""
    pieces = [np.arange(max(int(start), 1), int(end)) for start, end in segment.spans]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """Rows of numbers laid out as one tensor.

    Attributes:
        shape: (1, T) packed, or (B, T) padded.
        begins: (S,) where each row begins in the flattened tensor.
        lengths: of the rows.
        bounds: cumulative segment bounds of packed rows; None when padded.
    """

    shape: tuple[int, int]
    begins: np.ndarray
    lengths: list[int]
    bounds: tuple[int, ...] | None

    @classmethod
    def of(cls, lengths: Sequence[int], *, packed: bool) -> Layout:
        """End to end, or one under the other and padded on the right."""
        ends = np.cumsum(lengths)
        if packed:
            bounds = (0, *map(int, ends))
            return cls((1, bounds[-1]), np.array(bounds[:-1], dtype=np.int64), list(lengths), bounds)
        width = max(lengths)
        return cls((len(lengths), width), np.arange(len(lengths)) * width, list(lengths), None)

    def fill(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """The rows in their places, int64, zeros on the padding."""
        flat = np.zeros(self.shape[0] * self.shape[1], dtype=np.int64)
        for begin, length, row in zip(self.begins.tolist(), self.lengths, rows, strict=True):
            flat[begin : begin + length] = row
        return torch.from_numpy(flat).view(self.shape)

    def positions(self) -> torch.Tensor:
        """Like the tensor, from 0 in each row; padding gets the last real position, which every position table holds."""
        rows = [np.arange(length) for length in self.lengths]
        if self.bounds is not None:
            return self.fill(rows)
        last = np.array(self.lengths, dtype=np.int64)[:, None] - 1
        return torch.from_numpy(np.minimum(np.arange(self.shape[1]), last))

    def mask(self) -> torch.Tensor | None:
        """(B, T) bool, True on what is no padding; None when packed. Padding is never told by its id."""
        if self.bounds is not None:
            return None
        return torch.from_numpy(np.arange(self.shape[1]) < np.array(self.lengths)[:, None])

    def flat(self, places: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Places within each row -> (N,) places in the flattened tensor, and (N,) the row of each."""
        found = [begin + place for begin, place in zip(self.begins.tolist(), places, strict=True)]
        owner = np.repeat(np.arange(len(places)), [len(place) for place in places])
        return joined(found), torch.from_numpy(owner.astype(np.int64))


def joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """Numbers one after the other, int64."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def real_rows(segments: Sequence[Segment]) -> tuple[torch.Tensor, float]:
    """(S,) data-set row numbers, -1 for a filler, and how many are none."""
    rows = np.array([segment.row for segment in segments], dtype=np.int64)
    return torch.from_numpy(rows), float((rows >= 0).sum())


def collate(
    segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None = None, task: str | None = None
) -> Batch:
    """One micro-batch.

    Args:
        segments: the rows; none gives a filler batch.
        packed: one row of all tokens with segment bounds; else (B, T) padded on the right with zeros. What is padding
            stands in the mask; the padding id is never compared with anything.
        window: totals of the accumulation window, see :class:`~lightning_ft.data.plan.Plan`.
        task: name of the task that all rows belong to.
    """
    segments = list(segments) or [FILLER]
    layout = Layout.of([len(segment.ids) for segment in segments], packed=packed)
    targets = [targets_of(segment) for segment in segments]
    scored, owner = layout.flat([target - 1 for target in targets])
    rows, real = real_rows(segments)
    return Batch(
        ids=layout.fill([segment.ids for segment in segments]),
        positions=layout.positions(),
        bounds=layout.bounds,
        mask=layout.mask(),
        scored=scored,
        labels=joined([segment.ids[target] for segment, target in zip(segments, targets, strict=True)]),
        segment_of_scored=owner,
        rows=rows,
        counts={"token": float(len(scored)), "row": real},
        window=window,
        task=task,
    )
