"""The loss of rows or tokens with one class, several, or a value."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor


def row_losses(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss of each row.

    Args:
        logits: (S, C).
        targets: (S,) int64 classes, (S, C) float with 1 for each class that holds, or (S,) float values with C = 1.
        weights: (C,) weight of each class (of its positives, where several may hold); None: all 1.

    Returns:
        (S,), fp32.
    """
    logits = logits.float()
    if not targets.is_floating_point():
        return F.cross_entropy(logits, targets, weight=weights, reduction="none")
    if targets.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none").mean(-1)
    return (logits[:, 0] - targets.float()).square()
