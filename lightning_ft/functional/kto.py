"""KTO's losses, on single answers that somebody found good or bad, from log-probabilities alone.

r = log p(y) - log q(y) is the log-ratio of policy and reference, s the logistic function, b = ``beta``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KTOLoss = Literal["kto", "apo_zero_unpaired"]


def kl_estimate(total: Tensor, count: Tensor) -> Tensor:
    """max(0, total / count): how far the policy is from the reference, from answers to other prompts; no gradient.

    The mean log-ratio of answers y' that belong to other prompts. Their log-ratios are mostly negative once anything was
    learned, hence the bound. It is no unbiased estimate of the KL divergence, which would need the policy's own answers.

    Args:
        total: scalar, the sum of log p(y' | x) - log q(y' | x) over all ranks.
        count: scalar, how many that were.

    References:
        Ethayarajh et al., 2024 (KTO), section 4.2.
    """
    return (total / count.clamp(min=1)).clamp(min=0).detach()


def kto(ratio: Tensor, desirable: Tensor, kl: Tensor, beta: float, *, good: float = 1.0, bad: float = 1.0) -> Tensor:
    """w_good (1 - s(b (r - z))) for good answers and w_bad (1 - s(b (z - r))) for bad ones.

    Args:
        ratio: (S,) r.
        desirable: (S,) bool.
        kl: scalar z, see `kl_estimate`.
        beta: how strongly the policy is held to the reference.
        good: weight of good answers, the paper's lambda_D.
        bad: weight of bad answers, the paper's lambda_U.

    Returns:
        (S,) losses.

    References:
        Ethayarajh et al., 2024 (KTO: model alignment as prospect theoretic optimization), equations 7 and 8.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    weight = torch.where(desirable, good, bad).to(ratio.dtype)
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - kl)))


def apo_zero_unpaired(ratio: Tensor, desirable: Tensor, beta: float, *, good: float = 1.0, bad: float = 1.0) -> Tensor:
    """w_good (1 - s(b r)) for good answers and w_bad s(b r) for bad ones: KTO anchored at zero, which needs no estimate.

    Arguments and result are those of `kto`.

    References:
        D'Oosterlinck et al., 2024 (Anchored preference optimization), equation 7, for answers without partners.
    """
    return kto(ratio, desirable, ratio.new_zeros(()), beta, good=good, bad=bad)
