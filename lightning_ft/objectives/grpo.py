"""The policy-gradient losses of a micro-batch of answers that an earlier policy has written, and what is logged of them.

``batch.columns`` hold for each scored token ``advantages``, ``old_logps`` (or none in a round of a single step, when they are what
they are now) and, with a KL penalty, ``reference_logps``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.terms import Term
from lightning_ft.functional.kl_estimators import kl_estimate
from lightning_ft.functional.policy_gradient import (
    Clip,
    Importance,
    PolicyLoss,
    cispo_loss,
    clipped_loss,
    clipped_share,
    log_ratios,
    reduced,
)

Measured = dict[str, tuple[Tensor, float]]
"""Name -> (sum, how many it was summed over)."""


@dataclass(frozen=True)
class Settings:
    """Which loss.

    Attributes:
        loss: how tokens are added up, and what is clipped.
        importance: whether ratios are those of tokens or of answers.
        clip: how far ratios count.
        cispo_most: most that a ratio weighs in ``cispo``.
        beta: weight of the KL to the reference.
        correct_kl: whether the KL of each token is multiplied by its ratio.
        longest: most tokens an answer may have.
    """

    loss: PolicyLoss
    importance: Importance
    clip: Clip
    cispo_most: float
    beta: float
    correct_kl: bool
    longest: int


def terms(batch: Batch, logp: Tensor, settings: Settings) -> list[Term]:
    """The policy's loss, and with ``beta`` the KL to the reference (estimated by k3), added up alike.

    Args:
        batch: answers, of which each segment is one.
        logp: (N,) log-probabilities of the scored tokens now.
        settings: see there.
    """
    owner, advantages = batch.segment_of_scored, batch.columns["advantages"]
    ratio = log_ratios(logp, batch.columns.get("old_logps", logp.detach()), owner, settings.importance)
    if settings.loss == "cispo":
        losses = cispo_loss(ratio, logp, advantages, settings.cispo_most)
    else:
        losses = clipped_loss(ratio, advantages, settings.clip)
    found = [_term("policy", losses, batch, settings, 1.0)]
    if settings.beta > 0:
        kl = kl_estimate(logp, batch.columns["reference_logps"], "k3")
        kl = kl * ratio.exp() if settings.correct_kl else kl
        found.append(_term("kl_loss", kl, batch, settings, settings.beta))
    return found


def _term(name: str, losses: Tensor, batch: Batch, settings: Settings, weight: float) -> Term:
    total, unit = reduced(losses, batch.segment_of_scored, len(batch.rows), settings.loss, settings.longest)
    return Term(name, total, batch.counts[unit], unit, weight)


def measured(batch: Batch, logp: Tensor, entropy: Tensor, settings: Settings) -> Measured:
    """``entropy`` (N,) and how far the policy has gone from that which wrote the answers; means over tokens.

    ``ratio``, ``clipped_low`` and ``clipped_high`` (shares of tokens whose gradient is cut; of cispo the latter are those whose
    weight is held at its most, and none is low), and ``policy_kl``: KL(old || now), estimated by k3. At the first update of a
    round 1, 0, 0 and 0.
    """
    logp, count = logp.detach(), float(len(logp))
    old = batch.columns.get("old_logps", logp)
    ratio = log_ratios(logp, old, batch.segment_of_scored, settings.importance)
    if settings.loss == "cispo":
        high = ratio.exp() > settings.cispo_most
        low = torch.zeros_like(high)
    else:
        low, high = clipped_share(ratio, batch.columns["advantages"], settings.clip)
    return {
        "entropy": (entropy.sum(), count),
        "ratio": (ratio.exp().sum(), count),
        "clipped_low": (low.float().sum(), count),
        "clipped_high": (high.float().sum(), count),
        "policy_kl": (kl_estimate(old, logp, "k3").sum(), count),
    }


__all__ = ["Measured", "Settings", "measured", "terms"]
