"""A gradient that must not undo what a second one does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def project_(g: Sequence[Tensor], g_ref: Sequence[Tensor], dot: Tensor, squared: Tensor) -> float:
    """Averaged GEM's projection, in place (Chaudhry et al., 2019, equation 11).

    ``g <- g - (g . g_ref) / (g_ref . g_ref) g_ref`` where ``g . g_ref < 0``, else ``g`` as it is. Afterwards ``g . g_ref >= 0``,
    and of all such vectors this one is nearest to g.

    Args:
        g: the pieces of the gradient.
        g_ref: those of the gradient on rows of earlier tasks.
        dot: scalar, g . g_ref over all pieces.
        squared: scalar, g_ref . g_ref.

    Returns:
        The factor of g_ref that was taken off; 0 where nothing was done.
    """
    if not (float(dot) < 0 and float(squared) > 0):
        return 0.0
    factor = float(dot) / float(squared)
    for piece, ref in zip(g, g_ref, strict=True):
        piece.add_(ref.to(piece.dtype), alpha=-factor)
    return factor


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Scalar product over all pieces, in float64."""
    products = [(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum()


__all__ = ["dot", "project_"]
