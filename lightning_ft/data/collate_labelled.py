"""Labelled rows -> :class:`~lightning_ft.engine.batch.Batch`: a target for each row, or a class for each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from lightning_ft.data.collate import FILLER, Layout, Segment, joined, real_rows
from lightning_ft.engine.batch import Batch


@dataclass(frozen=True)
class LabelledSegment(Segment):
    """One tokenised row with its labels.

    Attributes:
        types: (T,) ``token_type_ids``, or None.
        at: (N,) positions of the tokens that have a class.
        classes: (N,) these classes.
        target: what the row asks for as a whole: () int64 or float32, or (C,) float32; None where its words are asked.
    """

    types: np.ndarray | None
    at: np.ndarray
    classes: np.ndarray
    target: np.ndarray | None


def collate_labelled(
    segments: Sequence[Segment],
    *,
    packed: bool,
    window: dict[str, float] | None = None,
    task: str | None = None,
    void: np.ndarray | None = None,
) -> Batch:
    """One micro-batch.

    Args:
        segments: `LabelledSegment` rows; none gives a filler batch.
        packed: one row of all tokens with segment bounds; else (B, T) padded on the right.
        window: totals of the accumulation window.
        task: name of the task that all rows belong to.
        void: the target of a filler, of the shape and dtype that all rows have.
    """
    rows = list(cast("Sequence[LabelledSegment]", segments)) or [_filler(void)]
    layout = Layout.of([len(row.ids) for row in rows], packed=packed)
    scored, owner = layout.flat([row.at for row in rows])
    numbers, real = real_rows(rows)
    targets = [row.target for row in rows if row.target is not None]
    types = [row.types for row in rows if row.types is not None]
    return Batch(
        ids=layout.fill([row.ids for row in rows]),
        positions=layout.positions(),
        bounds=layout.bounds,
        mask=layout.mask(),
        scored=scored,
        labels=joined([row.classes for row in rows]),
        segment_of_scored=owner,
        rows=numbers,
        counts={"token": float(len(scored)), "row": real},
        window=window,
        task=task,
        targets=torch.from_numpy(np.stack(targets)) if targets else None,
        types=layout.fill(types) if types else None,
    )


def _filler(void: np.ndarray | None) -> LabelledSegment:
    none = np.empty(0, dtype=np.int64)
    return LabelledSegment(ids=FILLER.ids, spans=FILLER.spans, row=-1, types=None, at=none, classes=none, target=void)
