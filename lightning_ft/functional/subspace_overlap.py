"""How much the rows of one LoRA factor overlap with those of others: what O-LoRA keeps small."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Overlap = Literal["cosine", "squared", "absolute"]


def overlap(new: Tensor, old: Tensor, measure: Overlap) -> Tensor:
    """Sum over all pairs of a row of ``new`` and a row of ``old`` of how much the two overlap; 0 where all are orthogonal.

    ``squared``: ``sum_jk (A_new A_old^T)_jk^2`` (Wang et al., 2023, equation 8). ``absolute``: ``sum_jk |A_new A_old^T|_jk``, as
    in the authors' code. Both fall when ``A_new`` shrinks, whatever its directions. ``cosine``: the sum of squared cosines, which
    only falls when rows turn away; a row of zeros overlaps with nothing.

    Args:
        new: (r, N).
        old: (R, N).
        measure: of one pair.

    Example:
        >>> new, old = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> [overlap(new, old, measure).item() for measure in ("cosine", "squared", "absolute")]
        [1.0, 36.0, 6.0]
    """
    products = new @ old.T  # (r, R)
    if measure == "absolute":
        return products.abs().sum()
    squares = products.square()
    if measure == "cosine":
        sizes = new.square().sum(1, keepdim=True) * old.square().sum(1)  # (r, R)
        squares = squares / sizes.clamp_min(torch.finfo(new.dtype).tiny)
    return squares.sum()


__all__ = ["Overlap", "overlap"]
