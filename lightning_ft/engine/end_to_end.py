"""Padded rows laid end to end on the device where they lie, so that nothing is computed for padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from lightning_ft.engine.batch import Batch


def end_to_end(batch: Batch) -> Batch:
    """The same rows as one packed row; those that are packed, or read by an encoder beside a decoder, as they are.

    Args:
        batch: what is scored stays in its order, so labels, targets and columns hold.
    """
    if batch.mask is None or batch.source is not None:
        return batch
    real = batch.mask
    place = real.reshape(-1).cumsum(0) - 1  # of each token among those that are real
    return replace(
        batch,
        ids=batch.ids[real][None],
        positions=batch.positions[real][None],
        types=batch.types[real][None] if batch.types is not None else None,
        bounds=(0, *accumulate(real.sum(1).tolist())),
        mask=None,
        scored=place[batch.scored],
    )


__all__ = ["end_to_end"]
