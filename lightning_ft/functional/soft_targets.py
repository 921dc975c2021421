"""What a model is held to that it has said before: its softened distribution, its logits, or the most likely of its tokens.

Symbols: ``z`` the logits kept or of the teacher, ``h`` those of the model now, both (N, C); natural logarithms; sums over rows in
float32 at least. Each is zero, with a zero gradient, where both agree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softened_kl_sum(h: Tensor, z: Tensor, temperature: float, columns: Tensor | None = None) -> Tensor:
    """``T^2 sum_n KL(softmax(z_n / T) || softmax(h_n / T))`` over some of the columns, by log_softmax alone.

    ``T^2`` keeps the size of the gradient as T grows (Hinton et al., 2015, section 2.1).

    Args:
        h: (N, C) with a gradient.
        z: (N, C) without.
        temperature: T.
        columns: (K,) the classes that are compared; None: all.
    """
    if columns is not None:
        h, z = h.index_select(1, columns), z.index_select(1, columns)
    student = torch.log_softmax(wide(h) / temperature, 1)
    teacher = torch.log_softmax(wide(z.detach()) / temperature, 1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum()


def logit_distance_sum(h: Tensor, z: Tensor, columns: Tensor | None = None) -> Tensor:
    """``sum_n ||z_n - h_n||^2`` (Buzzega et al., 2020, equation 6), over some of the columns or all."""
    if columns is not None:
        h, z = h.index_select(1, columns), z.index_select(1, columns)
    return (wide(z.detach()) - wide(h)).square().sum()


def top_kl(log_p: Tensor, log_rest: Tensor, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """KL of a distribution of which only the k most likely are known, and what is left over as one, from that of logits.

    ``KL = sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest)``: no more than the KL of the whole distributions, and
    zero where both agree. With S_k, S_rest the kept ones, the gradient with respect to a logit v is ``q_v`` less ``p_v`` for a
    kept v, and ``q_v - p_rest q_v / q_rest`` for the others.

    Args:
        log_p: (n, k) of the kept, and log_rest: (n,) of all others together.
        log_rest: (n,).
        logits: (n, V) of the model now.
        index: (n, k) which are kept.

    Returns:
        (n,) values, and (n, V) their gradients with respect to the logits.
    """
    log_q_all = torch.log_softmax(wide(logits), -1)
    log_q = log_q_all.gather(1, index)
    others = log_q_all.scatter(1, index, float("-inf"))
    log_q_rest = torch.logsumexp(others, 1)
    p, p_rest = log_p.exp(), log_rest.exp()
    left = torch.where(p_rest > 0, p_rest * (log_rest - log_q_rest), torch.zeros_like(p_rest))
    value = (p * (log_p - log_q)).sum(1) + left
    slope = log_q_all.exp() - p_rest[:, None] * (others - log_q_rest[:, None]).exp()
    return value, slope.scatter_add_(1, index, -p.to(slope.dtype))


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


__all__ = ["logit_distance_sum", "softened_kl_sum", "top_kl", "wide"]
