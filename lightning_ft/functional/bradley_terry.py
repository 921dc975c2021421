"""Rewards of two answers to one prompt as the chance that people prefer the first (Bradley and Terry, 1952)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """- log sigmoid(r_w - r_l - m) of each pair, in nats.

    Args:
        chosen: (P,) rewards r_w of the better answers.
        rejected: (P,) rewards r_l of the worse ones.
        margin: (P,) by how much r_w should exceed r_l before the loss is ln 2; None: 0.

    Returns:
        (P,), in the dtype of the rewards.
    """
    ahead = chosen - rejected
    return -F.logsigmoid(ahead if margin is None else ahead - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2 of each pair, which a difference leaves free: (P,) (Eisenstein et al., 2023)."""
    return (chosen + rejected).square()


def calibration_error(confident: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """The expected calibration error of choices that were put into bins by their confidence.

    Args:
        confident: (B,) sum of the confidences in each bin.
        right: (B,) number of right choices in each.
        counts: (B,) number of choices in each.

    Returns:
        Scalar: sum_b |confident_b - right_b| / sum_b counts_b, from 0 to 1; not a number of no choices.
    """
    return (confident - right).abs().sum() / counts.sum()


def bins_of(confidence: Tensor, bins: int) -> Tensor:
    """In which of so many equal bins between 1/2 and 1 each confidence falls: (P,) int64."""
    return ((2 * confidence - 1) * bins).floor().clamp(0, bins - 1).to(torch.int64)
