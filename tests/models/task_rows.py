"""Rows of uneven length, padded and packed, for models with the heads of tasks."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from tests.models.architectures import V

LENGTHS = (5, 8, 6, 3)
BOUNDS = (0, *accumulate(LENGTHS))
TOKENS = BOUNDS[-1]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def packed_ids() -> Tensor:
    """(1, 22) ids that no configuration takes for padding, a beginning or an end."""
    return torch.randint(4, V, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def padded(flat: Tensor, lengths: tuple[int, ...] = LENGTHS, *, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows laid end to end (N,) as (B, T), and the mask of what is real."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.full(mask.shape, fill, dtype=flat.dtype).masked_scatter(mask, flat), mask
