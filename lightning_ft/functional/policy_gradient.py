"""Losses of reinforcement learning on tokens that an earlier policy has written.

Notation: tokens of S answers laid end to end (N,), ``owner`` (N,) their answers; ``rho = p / p_old`` how much more likely a token
is now than when it was written, ``A`` its advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Importance = Literal["token", "sequence"]
PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]


@dataclass(frozen=True)
class Clip:
    """How far ``rho`` counts.

    Attributes:
        low: from 1 down to ``1 - low``.
        high: up to ``1 + high``; larger than ``low`` in DAPO ("clip-higher"), so that rare tokens can grow.
        both: most that ``rho`` may be in any case, also where the advantage is negative (Ye et al., 2020); None: no bound.
    """

    low: float = 0.2
    high: float = 0.2
    both: float | None = None


def log_ratios(logp: Tensor, old: Tensor, owner: Tensor, importance: Importance = "token") -> Tensor:
    """(N,) log rho of each token, or the mean over its answer's tokens for all of them (GSPO; Zheng et al., 2025, equation 7).

    Args:
        logp: (N,) log-probabilities now.
        old: (N,) when they were written.
        owner: (N,) int64, the answer of each token.
        importance: ``token``, or ``sequence``: the geometric mean of the answer's ratios.
    """
    ratio = logp - old
    if importance == "token" or not len(ratio):
        return ratio
    answers = int(owner.max()) + 1
    lengths = torch.bincount(owner, minlength=answers).clamp(min=1).to(ratio.dtype)
    return (ratio.new_zeros(answers).index_add(0, owner, ratio) / lengths)[owner]


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """(N,) ``- min(rho A, clip(rho) A)`` (Schulman et al., 2017, equation 7)."""
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    if clip.both is not None:
        ratio = ratio.clamp(max=clip.both)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def cispo_loss(log_ratio: Tensor, logp: Tensor, advantages: Tensor, most: float) -> Tensor:
    """(N,) ``- sg(min(rho, most)) A log p``: no token loses its gradient (MiniMax, 2025, equation 4)."""
    return -log_ratio.exp().clamp(max=most).detach() * advantages * logp


def clipped_share(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """(N,) bool each: tokens whose gradient is cut since they fell below, or rose above, what counts."""
    ratio = log_ratio.exp()
    return (ratio < 1 - clip.low) & (advantages < 0), (ratio > 1 + clip.high) & (advantages > 0)


def reduced(losses: Tensor, owner: Tensor, answers: int, kind: PolicyLoss, longest: int) -> tuple[Tensor, str]:
    """Sum of the losses of tokens, and the unit whose number in the window divides it.

    ``grpo``: the mean over each answer's tokens, then over answers (unit "row"), so that tokens of long answers count less;
    ``dr_grpo``: the sum over an answer's tokens, divided by the longest that is allowed (Liu et al., 2025), then by answers;
    ``dapo``, ``bnpo``, ``cispo``: the mean over all tokens (unit "token"). The last three differ in the literature by over which
    tokens, those of a micro-batch or of a step; here all divide by those of the step on all ranks.

    Args:
        losses: (N,).
        owner: (N,) int64, the answer of each token.
        answers: S.
        kind: which.
        longest: most tokens an answer may have, for ``dr_grpo``.
    """
    if kind in ("dapo", "bnpo", "cispo"):
        return losses.sum(), "token"
    if kind == "dr_grpo":
        return losses.sum() / longest, "row"
    lengths = torch.bincount(owner, minlength=answers).clamp(min=1).to(losses.dtype)
    return (losses / lengths[owner]).sum(), "row"


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """(N,) half the squared error, or the larger of it and that of values clipped to ``old`` +- ``clip``.

    Args:
        values: (N,) what is expected now.
        old: (N,) what was expected when the tokens were written.
        returns: (N,) what came of it.
        clip: how far values may move at once; None: any. Of unsure use (Andrychowicz et al., 2021), customary for language models.
    """
    error = (values - returns).square()
    if clip is not None:
        bounded = torch.maximum(torch.minimum(values, old + clip), old - clip)
        error = torch.maximum(error, (bounded - returns).square())
    return error / 2


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 knows all, 0 no better than their mean; NaN where all returns are equal."""
    spread = returns.var(correction=0)
    return 1 - (returns - values).var(correction=0) / torch.where(spread > 0, spread, torch.nan)
