"""How the work of a round is shared among ranks, and how its results come together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

One = TypeVar("One")

_STREAM = 11  # keeps these draws apart from those of data/plan.py and its neighbours


def answer_seed(seed: int, number: int, row: int, again: int, sample: int) -> int:
    """The seed of one answer, whichever rank and batch draws it.

    Args:
        seed: of the run.
        number: of the round.
        row: of the prompt in the data.
        again: how often that row came before in this round.
        sample: which of the answers to it.
    """
    key = np.random.SeedSequence([_STREAM, seed, number, row, again, sample])
    return int(key.generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits


def repeats(rows: Sequence[int]) -> list[int]:
    """How often each row came before in the list."""
    seen: dict[int, int] = {}
    found = []
    for row in rows:
        found.append(seen.get(row, 0))
        seen[row] = found[-1] + 1
    return found


def shares(count: int, ranks: int) -> list[range]:
    """Consecutive shares of ``count`` things for each rank; the first is never smaller than another."""
    ends = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(count), ranks))]).tolist()
    return [range(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]


def gathered(own: list[One]) -> list[One]:
    """The lists of all ranks, one after the other, on all of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return own
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [one for part in found for one in part]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is true on some rank; all ranks must ask."""
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)
