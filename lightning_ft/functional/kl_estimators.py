"""Estimates of KL(p || q) from tokens that were drawn from p (Schulman, 2020, http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logp: Tensor, logq: Tensor, estimator: Estimator = "k3") -> Tensor:
    """An estimate for each token, in nats; its mean over tokens drawn from p estimates KL(p || q).

    ``k1 = log p - log q`` is unbiased and often negative; ``k2 = (log p - log q)^2 / 2`` is biased, and its gradient is that of
    the KL; ``k3 = q/p - 1 - log q/p`` is unbiased, never negative, and varies less.

    Args:
        logp: any shape, log-probabilities under what the tokens were drawn from.
        logq: like ``logp``, of what it is compared with.
        estimator: which.
    """
    difference = logp - logq
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return (-difference).expm1() + difference


def adapted(coefficient: float, observed: float, *, target: float, horizon: float, steps: int) -> float:
    """The KL's coefficient for the next round, so that the KL approaches ``target`` (Ziegler et al., 2019, section 2.2).

    Args:
        coefficient: of this round.
        observed: KL of a whole answer in this round, mean over answers.
        target: the wanted one; 6 nats in the paper.
        horizon: answers over which a constant error of 20 % would change the coefficient by about that; 10,000 in the paper.
        steps: answers in this round.
    """
    error = min(max(observed / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * steps / horizon)
