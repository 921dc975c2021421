"""Weights of K losses that are minimised together, from the losses, their histories, or the lengths of their gradients.

    uncertainty  sum_k m_k exp(-s_k) L_k + s_k / 2, s_k = log sigma_k^2 learned; m_k is 1/2 for squared errors and 1 for
                 cross-entropies (Kendall, Gal and Cipolla, 2018, equations 7 and 10)
    dwa          w_k = K softmax_k(r_k / T), r_k = L_k(t - 1) / L_k(t - 2) (Liu, Johns and Davison, 2019, equation 7)
    gradnorm     minimise sum_k |w_k G_k - mean_j(w_j G_j) r_k^alpha| over w, then scale it to sum K; G_k the norm of L_k's
                 gradient, r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0)) (Chen et al., 2018, algorithm 1)
    famo         w_k = c z_k / L_k, z = softmax(x), c = 1 / sum_j z_j / L_j; after a step x falls along
                 J' (log L(t) - log L(t + 1)) + gamma x, J the Jacobian of the softmax (Liu et al., 2023, algorithm 1)

Losses are (K,) and positive where a logarithm or a ratio is taken; all is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-8


def uncertainty(losses: Tensor, log_variance: Tensor, share: Tensor) -> Tensor:
    """(K,) each task's part of the loss: ``m exp(-s) L + s / 2``, with a gradient in both.

    Args:
        losses: (K,), L.
        log_variance: (K,), s.
        share: (K,), m: 1/2 of a squared error, 1 of a cross-entropy.
    """
    return share * torch.exp(-log_variance) * losses + 0.5 * log_variance


def dwa_weights(before: Tensor, last: Tensor, temperature: float = 2.0) -> Tensor:
    """(K,) weights with the sum K: the slower a loss has fallen, the larger.

    Args:
        before: (K,) mean losses of the last period but one.
        last: (K,) of the last one.
        temperature: large ones make all alike; 2 is the paper's.
    """
    ratio = last.double() / before.double().clamp(min=_LEAST)
    return len(ratio) * torch.softmax(ratio / temperature, 0)


def gradnorm_slope(weights: Tensor, norms: Tensor, losses: Tensor, first: Tensor, alpha: float = 1.5) -> Tensor:
    """(K,) slope in w of GradNorm's own loss, whose targets are held constant.

    Args:
        weights: (K,), w.
        norms: (K,), G: of the gradients of the unweighted losses.
        losses: (K,) now.
        first: (K,) in the first step.
        alpha: how strongly tasks that lag are pulled; 0 gives all gradients one length.
    """
    weights, norms = weights.double(), norms.double()
    rate = losses.double() / first.double().clamp(min=_LEAST)
    target = (weights * norms).mean() * (rate / rate.mean()) ** alpha
    return torch.sign(weights * norms - target) * norms


def famo_weights(logits: Tensor, losses: Tensor) -> Tensor:
    """(K,) factors of the losses' gradients: in their direction the logarithms of all losses fall alike.

    Args:
        logits: (K,), x.
        losses: (K,), L.
    """
    share = torch.softmax(logits.double(), 0) / losses.double().clamp(min=_LEAST)
    return share / share.sum()


def famo_slope(logits: Tensor, before: Tensor, after: Tensor, gamma: float = 1e-3) -> Tensor:
    """(K,) slope in x: ``J' (log L(t) - log L(t + 1)) + gamma x``, so that a task that fell more than others weighs less.

    Args:
        logits: (K,), x.
        before: (K,) losses.
        after: (K,) losses after a step with weights of these logits.
        gamma: pulls the weights together; the paper's 1e-3.
    """
    z = torch.softmax(logits.double(), 0)
    fallen = before.double().clamp(min=_LEAST).log() - after.double().clamp(min=_LEAST).log()
    return z * (fallen - (z * fallen).sum()) + gamma * logits.double()


__all__ = ["dwa_weights", "famo_slope", "famo_weights", "gradnorm_slope", "uncertainty"]
