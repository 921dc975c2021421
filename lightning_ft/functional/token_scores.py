"""What one row of logits says about a token, and how each answer changes with the logits, in closed form.

Axes: n rows, V vocabulary. Every function returns ``(value, gradient)``: the value is (n,), the gradient is
d value / d logits, (n, V), or None when it was not asked for. Having the gradient in closed form lets the caller pull
it back through an output head at once and drop everything of size (n, V).

All of it is computed in float32 or above: a bfloat16 log-probability of -8 is off by 0.03, and ratios of two such
numbers are what PPO and DPO live on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Stands for log 0 where a finite number is needed: 0 * LOG_ZERO is 0, while 0 * -inf would be NaN.
LOG_ZERO = -1e30

#: The ratio of two probabilities from whose logarithm on one of them is nothing beside the other; e^80 is still a float32.
_FAR = 80.0


class Distribution(NamedTuple):
    """A softmax distribution, with what all of its scores share.

    Attributes:
        logits: (n, V) float32 or float64, after the temperature.
        probs: (n, V) ``softmax(logits)``.
        log_normaliser: (n, 1) ``logsumexp(logits)``.
        top: (n, 1) the largest logit.
    """

    logits: Tensor
    probs: Tensor
    log_normaliser: Tensor
    top: Tensor

    def log_probs(self) -> Tensor:
        """(n, V) log-probabilities; tokens of probability zero get a huge negative number instead of -inf."""
        return (self.logits - self.log_normaliser).clamp_(min=LOG_ZERO)


class TopK(NamedTuple):
    """What is kept of a distribution: its likeliest tokens, and the mass of all others together.

    Attributes:
        logprob: (n, k) log-probabilities of the kept tokens.
        tokens: (n, k) int64, which they are.
        rest: (n,) the log of the remaining mass.
    """

    logprob: Tensor
    tokens: Tensor
    rest: Tensor

    def block(self, rows: slice) -> TopK:
        """Those of some rows."""
        return TopK(self.logprob[rows], self.tokens[rows], self.rest[rows])


def distribution(logits: Tensor, temperature: float = 1.0) -> Distribution:
    """The distribution over tokens that ``logits`` stand for.

    Args:
        logits: (n, V), any floating dtype; below float32 it is raised to float32.
        temperature: what the logits are divided by. Gradients below are with respect to the divided logits.

    Returns:
        The distribution; no tensor in it shares memory with ``logits`` unless they were float32 or above already.
    """
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if temperature != 1.0:
        z = z / temperature
    probs = torch.softmax(z, dim=-1)
    top = z.amax(dim=-1, keepdim=True)
    # The most likely token has probability >= 1/V, so its logarithm is exact to rounding, and one pass over the
    # vocabulary (a second exp and sum) is saved against torch.logsumexp.
    return Distribution(z, probs, top - probs.amax(dim=-1, keepdim=True).log_(), top)


def log_prob(p: Distribution, labels: Tensor, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log p(label), whose gradient is onehot(label) - p.

    Args:
        p: the distribution of each row.
        labels: (n,) int64 token numbers in [0, V).
        gradient: whether to return d value / d logits.
    """
    index = labels.unsqueeze(-1)
    value = (p.logits.gather(-1, index) - p.log_normaliser).squeeze(-1)
    if not gradient:
        return value, None
    return value, p.probs.neg().scatter_add_(-1, index, torch.ones_like(index, dtype=p.probs.dtype))


def entropy(p: Distribution, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """H(p) = -sum p log p in nats, whose gradient is -p * (log p + H)."""
    logp = p.log_probs()
    value = -(p.probs * logp).sum(-1)
    if not gradient:
        return value, None
    return value, logp.add_(value.unsqueeze(-1)).mul_(p.probs).neg_()


def forward_kl(p: Distribution, q: Distribution, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """KL(q || p): q is the teacher, p the student that the gradient, p - q, belongs to (it covers all of q)."""
    value = (q.probs * q.log_probs().sub_(p.log_probs())).sum(-1)
    return value, (p.probs - q.probs if gradient else None)


def reverse_kl(p: Distribution, q: Distribution, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """KL(p || q): p is the student, which seeks a mode of q; gradient p * (log p - log q - KL)."""
    ratio = p.log_probs().sub_(q.log_probs())
    value = (p.probs * ratio).sum(-1)
    if not gradient:
        return value, None
    return value, ratio.sub_(value.unsqueeze(-1)).mul_(p.probs)


def jensen_shannon(
    p: Distribution, q: Distribution, beta: float = 0.5, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv:2306.13649, equation 1).

    beta * KL(q || m) + (1 - beta) * KL(p || m) with m = beta * q + (1 - beta) * p; p is the student.
    The gradient is (1 - beta) * p * (log p/m - KL(p || m)). Both are right relative to beta (1 - beta), however near an end.

    Args:
        p: the student's distribution.
        q: the teacher's distribution.
        beta: weight of the teacher, strictly between 0 and 1 (at 0 and 1 the divergence vanishes; the paper's limits
            there, divided by beta or 1 - beta, are the two KL divergences).
        gradient: whether to return d value / d logits of the student.
    """
    from_p, from_q = to_mixture(p.log_probs(), q.log_probs(), beta)
    teacher = (q.probs * from_q.neg_()).sum(-1)
    ratio = from_p.neg_()
    student = (p.probs * ratio).sum(-1)
    value = beta * teacher + (1.0 - beta) * student
    if not gradient:
        return value, None
    return value, ratio.sub_(student.unsqueeze(-1)).mul_(p.probs).mul_(1.0 - beta)


def to_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The logarithms of m/p and m/q, m = beta q + (1 - beta) p, 0 < beta < 1, from log-probabilities.

    Near an end m is almost one of the two, and the difference of rounded logarithms would be noise, which the division by beta or
    1 - beta blows up. So log m/p = log1p(beta expm1(log q/p)) where beta is small, and log m/q likewise where it is large.
    """
    if beta > 0.5:
        from_q, from_p = to_mixture(log_q, log_p, 1.0 - beta)
        return from_p, from_q
    apart = log_q - log_p
    near = apart.clamp(max=_FAR)
    found = torch.log1p(torch.expm1(near) * beta)
    return found + (apart - near), found - near


def skewed_kl(
    p: Distribution, q: Distribution, beta: float = 0.1, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """KL(q || m), m = beta q + (1 - beta) p: the forward KL, bounded by -log beta (DistiLLM, Ko et al., 2024, equation 2).

    The gradient is p (g - <p, g>) with g = -(1 - beta) q / m.
    """
    m = _mixed(q, p, beta)
    value = (q.probs * (q.log_probs().sub_(m.log().clamp_(min=LOG_ZERO)))).sum(-1)
    return value, (_through_softmax(p, (q.probs / m).mul_(beta - 1.0)) if gradient else None)


def skewed_reverse_kl(
    p: Distribution, q: Distribution, beta: float = 0.1, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """KL(p || m), m = beta p + (1 - beta) q: the reverse KL, bounded by -log beta (DistiLLM, Ko et al., 2024).

    The gradient is p (g - <p, g>) with g = log p/m - beta p / m.
    """
    m = _mixed(p, q, beta)
    ratio = p.log_probs().sub_(m.log().clamp_(min=LOG_ZERO))
    value = (p.probs * ratio).sum(-1)
    return value, (_through_softmax(p, ratio.sub_((p.probs / m).mul_(beta))) if gradient else None)


def total_variation(p: Distribution, q: Distribution, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """Half the sum of |p - q|, from 0 to 1 (Wen et al., 2023, equation 9); gradient p (g - <p, g>) with g = sign(p - q) / 2."""
    apart = p.probs - q.probs
    value = apart.abs().sum(-1) / 2
    return value, (_through_softmax(p, apart.sign_().div_(2)) if gradient else None)


def _mixed(one: Distribution, other: Distribution, share: float) -> Tensor:
    """(n, V) probabilities: so much of one, and the rest of the other; never quite zero."""
    return (one.probs * share).add_(other.probs, alpha=1.0 - share).clamp_(min=torch.finfo(one.probs.dtype).tiny)


def _through_softmax(p: Distribution, slope: Tensor) -> Tensor:
    """The gradient with respect to logits of a value whose gradient with respect to p is ``slope``, which is overwritten."""
    return slope.sub_((p.probs * slope).sum(-1, keepdim=True)).mul_(p.probs)


def top_k_kl(p: Distribution, q: TopK, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """KL(q || p) over k + 1 events: the tokens that were kept of the teacher q, and any other one.

    Nothing is renormalised: the mass of the others is asked of the student as a whole, and how it is shared out among them is
    left to the student, so that the gradient is p - q', where q' gives the others q(rest) in proportion to p.

    Args:
        p: the student's distribution, at the temperature that the teacher was kept at.
        q: what was kept of the teacher.
        gradient: whether to return d value / d logits of the student.
    """
    index = q.tokens
    probs, mass = q.logprob.to(p.probs.dtype).exp(), q.rest.to(p.probs.dtype).exp()
    left = p.probs.scatter(-1, index, 0.0)  # (n, V)
    rest = left.sum(-1)
    logp = p.logits.gather(-1, index) - p.log_normaliser
    value = (probs * (q.logprob - logp)).sum(-1) + mass * (q.rest - rest.log().clamp(min=LOG_ZERO))
    if not gradient:
        return value, None
    left.mul_((mass / rest.clamp(min=torch.finfo(rest.dtype).tiny)).unsqueeze(-1))
    return value, p.probs - left.scatter_(-1, index, probs)


def top_k(p: Distribution, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely tokens and what is left for all others (no gradient; for a teacher's cache).

    Args:
        p: the distribution of each row.
        k: how many tokens to keep, 1 <= k <= V.

    Returns:
        log-probabilities (n, k) in falling order, token numbers (n, k), and the log of the remaining mass (n,), summed
        over the tokens that were not kept (one minus the kept mass would cancel where the model is sure).
    """
    _, index = p.logits.topk(k, dim=-1)
    logp = p.logits.gather(-1, index) - p.log_normaliser
    rest = p.probs.scatter(-1, index, 0.0).sum(-1).log_().clamp_(min=LOG_ZERO)
    return logp, index, rest


def drawn(p: Distribution, count: int, generator: torch.Generator | None = None) -> TopK:
    """What ``count`` tokens that were drawn from ``p`` say of it: each with its share of the draws, and no mass for the others.

    The mean over draws is ``p`` itself, so that the gradient of `top_k_kl` to it is right on average, also for the tail that the
    likeliest tokens leave out (Anshumann et al., 2025, random-sampling distillation, here with ``p`` itself as what is drawn from).

    Args:
        p: the distribution of each row.
        count: draws a row.
        generator: of the draws, on the device of ``p``.

    Returns:
        At most ``count`` different tokens a row, in falling order of their share; shares of zero fill it up.
    """
    tokens = torch.multinomial(p.probs, count, replacement=True, generator=generator)  # (n, count)
    shares = torch.zeros_like(p.probs).scatter_add_(
        -1, tokens, torch.full_like(p.probs[:, :1], 1.0 / count).expand_as(tokens)
    )
    kept, index = shares.topk(min(count, shares.shape[-1]), dim=-1)
    return TopK(kept.log_().clamp_(min=LOG_ZERO), index, torch.full_like(kept[:, 0], LOG_ZERO))


def is_top(p: Distribution, labels: Tensor) -> Tensor:
    """(n,) bool: whether no token is likelier than the label. Ties, common in bfloat16, count as hits."""
    return p.logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) >= p.top.squeeze(-1)
