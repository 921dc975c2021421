"""Segments of a packed row that begin alike and hold their common beginning once.

The first of them is laid out whole; the others hold only what is their own and see the first tokens of that one before it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lightning_ft.functional.errors import Refusal

Shared = tuple[tuple[int, int] | None, ...]
"""For each segment: the earlier segment whose first tokens it sees before its own, and how many; None where none."""


def check_shared(bounds: tuple[int, ...], shared: Shared, causal: bool) -> None:
    """Refuses sharing that attention could not follow; ``causal``: whether a token sees only what is before it."""
    if not causal:
        raise Refusal(
            "Segments can share their beginning only where a token sees nothing that follows it; this layer looks both ways, "
            "so give it whole rows."
        )
    lengths = [b - a for a, b in pairwise(bounds)]
    if len(shared) != len(lengths):
        raise Refusal(f"segment_shared has {len(shared)} entries for {len(lengths)} segments.")
    for segment, entry in enumerate(shared):
        if entry is None:
            continue
        owner, count = entry
        if not 0 <= owner < segment or shared[owner] is not None or not 0 < count <= lengths[owner]:
            raise Refusal(
                f"segment_shared[{segment}] = {entry} must name an earlier segment that shares nothing itself, and some of its "
                "first tokens."
            )


@lru_cache(maxsize=8)
def keys_seen(bounds: tuple[int, ...], shared: Shared, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """What each segment sees, laid end to end.

    Returns:
        (L,) places in the packed row, int64, and the cumulative bounds (0, ..., L) of the segments among them.
    """
    places: list[Tensor] = []
    ends = [0]
    with torch.inference_mode(False):
        for (begin, end), seen in zip(pairwise(bounds), shared, strict=True):
            if seen is not None:
                places.append(torch.arange(bounds[seen[0]], bounds[seen[0]] + seen[1], device=device))
            places.append(torch.arange(begin, end, device=device))
            ends.append(ends[-1] + end - begin + (seen[1] if seen is not None else 0))
        return torch.cat(places), tuple(ends)
