"""How far a student is from its teacher: divergences of distributions, distances of hidden states, relations of tokens.

Names: z_s, z_t logits of student and teacher, p = softmax(z_s / T), q = softmax(z_t / T), T the temperature. Axes: N rows or
tokens, C classes or tokens of a vocabulary, D width, B rows, A heads, T tokens. Values are sums over nothing: (N,) or (B,),
in nats, in float32 or above. The teacher is a constant: callers hand it over without a gradient.

* forward KL(q || p) makes the student cover all that the teacher holds possible, reverse KL(p || q) makes it keep to what the
  teacher holds likely;
* JSD(b) = b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, vanishes at both ends of b; divided by b (1 - b), as here, it
  becomes the forward KL for b -> 0 and the reverse KL for b -> 1 (Agarwal et al., 2024, section 2), so that b does not rescale
  the learning rate;
* the skewed KLs (DistiLLM, Ko et al., 2024) look at a mixture, KL(q || b q + (1 - b) p) and KL(p || b p + (1 - b) q), so that they
  are at most -log b however far apart the two are; the total variation, |p - q| / 2 summed, is at most 1; both before the factor
  of the temperature;
* gradients of soft targets shrink like 1 / T^2, so they are multiplied by T^2 (Hinton et al., 2015, section 2): for T -> oo
  T^2 KL becomes half the variance over classes of z_s - z_t. Those of the total variation, whose value is no square of the
  difference near zero, shrink like 1 / T, so that its factor is T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.token_scores import to_mixture

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation"]
LayerMap = Literal["last", "uniform"]

#: Stands for log 0 where a finite number is needed, see `lightning_ft.functional.token_scores`.
_LOG_ZERO = -1e30


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """KL(q || p) of log-probabilities (..., C): (...); ``beta`` has no say."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """KL(p || q) of log-probabilities (..., C): (...); ``beta`` has no say."""
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """JSD(beta) / (beta (1 - beta)) of log-probabilities (..., C): (...); at 0 and 1 its limits, the two KLs."""
    if beta in (0.0, 1.0):
        return (forward_kl if beta == 0.0 else reverse_kl)(log_p, log_q)
    from_p, from_q = to_mixture(log_p, log_q, beta)
    return -(log_q.exp() * from_q).sum(-1) / (1 - beta) - (log_p.exp() * from_p).sum(-1) / beta


def skewed_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.1) -> Tensor:
    """KL(q || beta q + (1 - beta) p) of log-probabilities (..., C): (...); at 0 the forward KL (DistiLLM)."""
    return forward_kl(_mixed(log_q, log_p, beta), log_q)


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.1) -> Tensor:
    """KL(p || beta p + (1 - beta) q) of log-probabilities (..., C): (...); at 0 the reverse KL (DistiLLM)."""
    return forward_kl(_mixed(log_p, log_q, beta), log_p)


def total_variation(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Half the sum of |p - q| of log-probabilities (..., C): (...); ``beta`` has no say."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Log of so much of one distribution and the rest of the other."""
    if share in (0.0, 1.0):
        return one if share else other
    return torch.logaddexp(one + math.log(share), other + math.log(1 - share))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
}


def in_chunks(divergence: Divergence, beta: float) -> tuple[str, float]:
    """Which output of `lightning_ft.nn.head.score_tokens` a divergence is, and what it is multiplied by."""
    if divergence != "jensen_shannon":
        return divergence, 1.0
    if beta in (0.0, 1.0):
        return ("forward_kl" if beta == 0.0 else "reverse_kl"), 1.0
    return "jensen_shannon", 1.0 / (beta * (1.0 - beta))


def temperature_factor(divergence: Divergence, temperature: float) -> float:
    """What a divergence is multiplied by, so that the temperature changes neither its size nor that of its gradient."""
    return temperature if divergence == "total_variation" else temperature**2


def soft_targets(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence = "forward_kl",
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    scale_t2: bool = True,
) -> Tensor:
    """The divergence of two softmax distributions.

    Args:
        student: (N, C) logits.
        teacher: (N, C) logits.
        divergence: which, see above.
        temperature: what both are divided by.
        beta: weight of the teacher in ``jensen_shannon``, 0 to 1.
        scale_t2: whether to multiply by the square of the temperature, see `temperature_factor`.

    Returns:
        (N,), zero where the two agree.

    Example:
        >>> soft_targets(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        0.0
    """
    log_p = F.log_softmax(_wide(student) / temperature, -1)
    log_q = F.log_softmax(_wide(teacher) / temperature, -1)
    factor = temperature_factor(divergence, temperature) if scale_t2 else 1.0
    return DIVERGENCES[divergence](log_p, log_q, beta) * factor


def soft_decisions(
    student: Tensor, teacher: Tensor, divergence: Divergence = "forward_kl", **settings: float
) -> Tensor:
    """The same where each of C classes holds or not by itself: the mean over classes of the divergences of sigmoids, (N,).

    A sigmoid is a softmax over (z, 0), so that all of `soft_targets` holds.
    """
    both = [torch.stack([z, torch.zeros_like(z)], -1) for z in (student, teacher)]  # (N, C, 2)
    return soft_targets(both[0], both[1], divergence, **settings).mean(-1)  # type: ignore[arg-type]


def soft_values(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of two predictions: (N, 1) each -> (N,)."""
    return (_wide(student) - _wide(teacher)).square().sum(-1)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the width: (N, D) each -> (N,)."""
    return (_wide(student) - _wide(teacher)).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of two vectors (DistilBERT): (N, D) each -> (N,), 0 where they point the same way."""
    return 1.0 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)


def map_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of attention maps, the mean over heads and real tokens of each row (MiniLM, equation 5).

    Args:
        student: (B, A, T, T) probabilities, rows of which sum to 1; 0 where a token is not seen.
        teacher: the same of the teacher.
        mask: (B, T) bool, True on real tokens.

    Returns:
        (B,), in nats.
    """
    p, q = _wide(student), _wide(teacher)
    seen = q > 0
    # Where the teacher is exactly 0 nothing is asked; a student's 0 where the teacher looks is a huge finite loss.
    ratio = torch.where(seen, q, 1.0).log() - torch.where(seen, p, 1.0).clamp_min(torch.finfo(p.dtype).tiny).log()
    return _over_queries((q * ratio).sum(-1), mask)


def relation_log_probs(values: Tensor, heads: int, mask: Tensor) -> Tensor:
    """How the tokens of each row relate: log softmax(V V^T / sqrt(d)), one for each head (MiniLM, equation 6).

    Args:
        values: (B, T, A d), what an attention layer's values are; of any number of heads.
        heads: A, into how many the width is split.
        mask: (B, T) bool, True on real tokens.

    Returns:
        (B, A, T, T) in float32 or above; tokens that are padding are not looked at.

    Raises:
        Refusal: the width cannot be split so.
    """
    rows, tokens, width = values.shape
    if width % heads:
        raise Refusal(f"Values of width {width} cannot be split into {heads} relation heads; choose a divisor.")
    v = _wide(values).view(rows, tokens, heads, width // heads).transpose(1, 2)  # (B, A, T, d)
    scores = v @ v.transpose(-1, -2) / (width // heads) ** 0.5  # (B, A, T, T)
    return F.log_softmax(scores.masked_fill(~mask[:, None, None, :], _LOG_ZERO), -1)


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of value relations, the mean over heads and real tokens of each row (MiniLM, equation 7).

    Args:
        student: (B, A, T, T) log-probabilities, as `relation_log_probs` gives them.
        teacher: the same of the teacher, with as many heads.
        mask: (B, T) bool, True on real tokens.

    Returns:
        (B,), in nats.
    """
    return _over_queries((teacher.exp() * (teacher - student)).sum(-1), mask)


def layer_map(layers: LayerMap | dict[int, int], student: int, teacher: int) -> dict[int, int]:
    """Which layer of the student learns from which of the teacher: numbers count blocks from 1, 0 are the embeddings.

    Args:
        layers: ``last``: the last from the last; ``uniform``: layer i of S from layer round(i T / S) of T; or the pairs.
        student: S, how many blocks the student has.
        teacher: T, how many the teacher has.

    Raises:
        Refusal: a number that one of them does not have.

    Example:
        >>> layer_map("uniform", 3, 6)
        {1: 2, 2: 4, 3: 6}
    """
    if layers == "last":
        return {student: teacher}
    if layers == "uniform":
        return {i: (2 * i * teacher + student) // (2 * student) for i in range(1, student + 1)}
    assert not isinstance(layers, str)
    for own, other in layers.items():
        if not (0 <= own <= student and 0 <= other <= teacher):
            raise Refusal(
                f"layers maps {own} to {other}, but the student has {student} blocks and the teacher {teacher}; number them from "
                "1, 0 being the embeddings."
            )
    return dict(layers)


def uniform_layers(keep: int, layers: int) -> list[int]:
    """``keep`` block numbers from 0, at even distances, the first and the last among them, as DistilBERT was begun with.

    Example:
        >>> uniform_layers(6, 12)
        [0, 2, 4, 7, 9, 11]
    """
    if keep == 1:
        return [0]
    return [(2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def _over_queries(values: Tensor, mask: Tensor) -> Tensor:
    """(B, A, T) -> (B,): the mean over heads and over the tokens that are real."""
    per_token = values.mean(1)  # (B, T)
    real = mask.to(per_token.dtype)
    return torch.where(mask, per_token, 0.0).sum(-1) / real.sum(-1).clamp_min(1.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


__all__ = [
    "DIVERGENCES",
    "Divergence",
    "LayerMap",
    "forward_kl",
    "hidden_cosine",
    "hidden_mse",
    "in_chunks",
    "jensen_shannon",
    "layer_map",
    "map_kl",
    "relation_kl",
    "relation_log_probs",
    "reverse_kl",
    "skewed_kl",
    "skewed_reverse_kl",
    "soft_decisions",
    "soft_targets",
    "soft_values",
    "temperature_factor",
    "total_variation",
    "uniform_layers",
]
