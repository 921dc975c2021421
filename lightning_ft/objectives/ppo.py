"""PPO for answers: what each of their tokens was worth, and the losses of policy and values on them.

Tokens of kept answers lie end to end, (N,); ``owner`` (N,) int64, ascending, says whose each is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.terms import Term
from lightning_ft.functional.advantages import Moments, generalised_advantages, whiten
from lightning_ft.functional.kl_estimators import kl_estimate
from lightning_ft.functional.policy_gradient import Clip, clipped_loss, clipped_share, log_ratios, value_loss
from lightning_ft.functional.token_rewards import token_rewards, without_end

Measured = dict[str, tuple[Tensor, float]]
"""Name -> (sum, how many it was summed over)."""


@dataclass(frozen=True)
class Appraisal:
    """How answers become advantages.

    Attributes:
        gamma: discount of what comes a token later.
        lam: of the generalised advantages.
        missing_end_penalty: what an answer without an end loses.
        whiten_rewards: whether the rewards of tokens get variance 1 over the round, their mean kept.
        whiten_advantages: whether advantages get mean 0 and variance 1 over the round.
    """

    gamma: float = 1.0
    lam: float = 0.95
    missing_end_penalty: float = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True


def appraised(
    scores: Tensor,
    ended: Tensor,
    owner: Tensor,
    values: Tensor,
    kl: Tensor | None,
    coefficient: float,
    how: Appraisal,
) -> tuple[Tensor, Tensor]:
    """Advantages (N,) and returns (N,) of a whole round, in float64.

    Args:
        scores: (S,) of answers.
        ended: (S,) bool, which ended by themselves.
        owner: (N,) into S.
        values: (N,) what was expected before each token.
        kl: (N,) log p - log q (k1) of each, as a penalty in the reward; None: none.
        coefficient: of it.
        how: see there.
    """
    scores = without_end(scores.double(), ended, how.missing_end_penalty)
    rewards = token_rewards(scores, owner, None if kl is None else kl.double(), coefficient)
    if how.whiten_rewards:
        rewards = whiten(rewards, Moments.of(rewards), shift=False)
    advantages, returns = generalised_advantages(rewards, values.double(), owner, gamma=how.gamma, lam=how.lam)
    if how.whiten_advantages:
        advantages = whiten(advantages, Moments.of(advantages))
    return advantages, returns


@dataclass(frozen=True)
class Settings:
    """The losses.

    Attributes:
        clip: how far ratios of the policy count.
        value_clip: how far values may move in a round; None: any.
        value_weight: of the values' loss.
        entropy_weight: of the policy's entropy, which is then raised.
        correct_kl: whether a KL in the loss is multiplied by the token's ratio.
    """

    clip: Clip
    value_clip: float | None
    value_weight: float
    entropy_weight: float
    correct_kl: bool = True


def terms(
    batch: Batch, logp: Tensor, values: Tensor, entropy: Tensor, settings: Settings, kl_weight: float = 0.0
) -> list[Term]:
    """``policy``, ``value``, and where they have a weight ``kl_loss`` (k3 to the reference) and ``entropy_bonus``; all per token.

    Args:
        batch: its ``columns`` have ``advantages``, ``returns``, ``old_logps`` and ``old_values``, with a KL also
            ``reference_logps``, (N,) each.
        logp: (N,) now.
        values: (N,) expected now.
        entropy: (N,) of the policy at each token.
        settings: see there.
        kl_weight: of the KL in the loss.
    """
    columns, count = batch.columns, batch.counts["token"]
    ratio = log_ratios(logp, columns["old_logps"], batch.segment_of_scored)
    policy = clipped_loss(ratio, columns["advantages"], settings.clip)
    value = value_loss(values, columns["old_values"], columns["returns"], settings.value_clip)
    found = [
        Term("policy", policy.sum(), count),
        Term("value", value.sum(), count, weight=settings.value_weight),
    ]
    if kl_weight > 0:
        kl = kl_estimate(logp, columns["reference_logps"], "k3")
        kl = kl * ratio.exp() if settings.correct_kl else kl
        found.append(Term("kl_loss", kl.sum(), count, weight=kl_weight))
    if settings.entropy_weight > 0:
        found.append(Term("entropy_bonus", -entropy.sum(), count, weight=settings.entropy_weight))
    return found


def measured(batch: Batch, logp: Tensor, values: Tensor, entropy: Tensor, settings: Settings) -> Measured:
    """Means over tokens: ``entropy``, ``ratio``, ``clipped_low``, ``clipped_high``, ``clipped_values`` and ``policy_kl``.

    ``policy_kl`` is KL(old || now) by k3. At the first update of a round the last five are 1, 0, 0, 0 and 0.
    """
    columns, count, logp = batch.columns, float(len(logp)), logp.detach()
    old = columns["old_logps"]
    ratio = log_ratios(logp, old, batch.segment_of_scored)
    low, high = clipped_share(ratio, columns["advantages"], settings.clip)
    moved = (values.detach() - columns["old_values"]).abs()
    beyond = moved > (torch.inf if settings.value_clip is None else settings.value_clip)
    each = {
        "entropy": entropy.detach(),
        "ratio": ratio.exp(),
        "clipped_low": low,
        "clipped_high": high,
        "clipped_values": beyond,
        "policy_kl": kl_estimate(old, logp, "k3"),
    }
    return {name: (value.float().sum(), count) for name, value in each.items()}


__all__ = ["Appraisal", "Measured", "Settings", "appraised", "measured", "terms"]
