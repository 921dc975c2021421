"""Some rows of a batch as a batch of their own, on the device where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from lightning_ft.engine.batch import Batch, Source


def part_of(batch: Batch, segments: Sequence[int]) -> Batch:
    """The batch of these segments alone, in their order; without columns, counts and targets.

    Args:
        batch: packed or padded, of rows that share no beginning.
        segments: which, ascending, at least one.
    """
    assert batch.shared is None, "a row that leans on another cannot be taken out"
    device, kept = batch.ids.device, torch.zeros(len(batch.rows), dtype=torch.bool)
    kept[list(segments)] = True
    mine = kept.to(device)
    if batch.bounds is None:
        tokens = mine[:, None].expand(batch.ids.shape)
        shape, bounds = (len(segments), -1), None
    else:
        lengths = torch.tensor(batch.bounds).diff()
        tokens = kept.repeat_interleave(lengths).to(device)[None]
        shape, bounds = (1, -1), (0, *accumulate(lengths[kept].tolist()))
    place = tokens.reshape(-1).cumsum(0) - 1  # of each token among those that stay
    scored = mine[batch.segment_of_scored]
    return replace(
        batch,
        ids=batch.ids[tokens].reshape(shape),
        positions=batch.positions[tokens].reshape(shape),
        bounds=bounds,
        mask=batch.mask[mine] if batch.mask is not None else None,
        scored=place[batch.scored[scored]],
        labels=batch.labels[scored],
        segment_of_scored=(mine.cumsum(0) - 1)[batch.segment_of_scored[scored]],
        rows=batch.rows[mine],
        counts={},
        window=None,
        targets=None,
        types=batch.types[tokens].reshape(shape) if batch.types is not None else None,
        source=Source(batch.source.ids[mine], batch.source.mask[mine]) if batch.source is not None else None,
        columns={},
    )


__all__ = ["part_of"]
