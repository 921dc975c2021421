"""Which labels a likelihood is asked about: drawn from the model itself, the likeliest ones, or those in the data.

The true Fisher information is an expectation over labels that the model itself would give. Labels in the data give the empirical
one, which vanishes where the data are fitted, that is, just when a task is over.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label for each row of logits, drawn from their softmax by the inverse of its distribution function.

    Args:
        logits: (N, C).
        uniform: (N,) numbers in [0, 1), one for each row, so that what is drawn depends on nothing else.

    Returns:
        (N,) int64.
    """
    heap = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).cumsum(-1)  # (N, C)
    point = uniform.to(heap)[:, None] * heap[:, -1:]
    return torch.searchsorted(heap, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers out of uniform ones in [0, 1), in float64, by the inverse of their distribution function."""
    inside = uniform.double().clamp(2.0**-53, 1 - 2.0**-53)
    return torch.erfinv(2 * inside - 1) * 2**0.5
