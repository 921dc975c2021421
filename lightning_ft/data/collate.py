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
    lengths = [len(segment.ids) for segment in segments]
    width = max(lengths)
    begins = np.concatenate([[0], np.cumsum(lengths)]) if packed else np.arange(len(segments) + 1) * width
    shape = (1, int(begins[-1])) if packed else (len(segments), width)
    ids = np.zeros(int(begins[-1]), dtype=np.int64)
    positions = np.zeros_like(ids)
    mask = np.zeros(ids.shape, dtype=bool)
    scored, labels, owner = [], [], []
    for number, segment in enumerate(segments):
        begin, end = int(begins[number]), int(begins[number]) + lengths[number]
        ids[begin:end] = segment.ids
        positions[begin:end] = np.arange(lengths[number])
        mask[begin:end] = True
        if not packed:  # padding gets the last real position, which every position table holds
            positions[end : int(begins[number + 1])] = lengths[number] - 1
        targets = targets_of(segment)
        scored.append(begin + targets - 1)
        labels.append(segment.ids[targets])
        owner.append(np.full(len(targets), number, dtype=np.int64))
    rows = np.array([segment.row for segment in segments], dtype=np.int64)
    flat = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (scored, labels, owner)]
    return Batch(
        ids=torch.from_numpy(ids).view(shape),
        positions=torch.from_numpy(positions).view(shape),
        bounds=tuple(int(b) for b in begins) if packed else None,
        mask=None if packed else torch.from_numpy(mask).view(shape),
        scored=flat[0],
        labels=flat[1],
        segment_of_scored=flat[2],
        rows=torch.from_numpy(rows),
        counts={"token": float(len(flat[0])), "row": float((rows >= 0).sum())},
        window=window,
        task=task,
    )
