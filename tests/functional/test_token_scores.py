"""Closed-form token scores and gradients against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lightning_ft.functional import token_scores as ts
from tests.tolerances import TOL

MIXED = ("jensen_shannon", "skewed_kl", "skewed_reverse_kl")
DIVERGENCES = ("forward_kl", "reverse_kl", "total_variation", *MIXED)


def reference(name: str, z: Tensor, labels: Tensor, q: Tensor, beta: float) -> Tensor:
    """The same quantity, written with torch's own log_softmax and kl_div."""
    logp, logq = z.log_softmax(-1), q.log_softmax(-1)
    if name == "log_prob":
        return -torch.nn.functional.cross_entropy(z, labels, reduction="none")
    if name == "entropy":
        return torch.distributions.Categorical(logits=z).entropy()
    if name == "forward_kl":
        return kl_div(logp, logq, reduction="none", log_target=True).sum(-1)
    if name == "reverse_kl":
        return kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    if name == "total_variation":
        return (logp.exp() - logq.exp()).abs().sum(-1) / 2
    if name == "skewed_reverse_kl":
        logp, logq = logq, logp  # the same of the two in each other's place
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log(1 - beta))
    to_m: Callable[[Tensor], Tensor] = lambda a: kl_div(logm, a, reduction="none", log_target=True).sum(-1)  # noqa: E731
    if name.startswith("skewed"):
        return to_m(logq)
    return beta * to_m(logq) + (1 - beta) * to_m(logp)


@pytest.mark.parametrize("name", ["log_prob", "entropy", *DIVERGENCES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_equal_autograd(name: str, dtype: torch.dtype) -> None:
    """Value and slope agree with float64 autograd of an independent formula, at a temperature."""
    torch.manual_seed(0)
    z = (torch.randn(7, 41, dtype=torch.float64) * 3).to(dtype)
    q = (torch.randn(7, 41, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(41, (7,))
    exact = (z.double() / 0.7).requires_grad_()
    expected = reference(name, exact, labels, q.double() / 0.7, 0.3)
    (slope,) = torch.autograd.grad(expected.sum(), exact)

    p, other = ts.distribution(z, 0.7), ts.distribution(q, 0.7)
    extra = {"log_prob": (labels,), "entropy": (), **dict.fromkeys(MIXED, (other, 0.3))}.get(name, (other,))
    value, gradient = getattr(ts, name)(p, *extra)
    torch.testing.assert_close(value.double(), expected.detach(), atol=TOL[dtype] * 3, rtol=TOL[dtype])
    torch.testing.assert_close(gradient.double(), slope, atol=TOL[dtype], rtol=TOL[dtype])
    assert getattr(ts, name)(p, *extra, gradient=False)[1] is None


def test_low_precision_logits_are_scored_in_float32() -> None:
    """bfloat16 logits give the exact log-probability of those rounded logits, not a rounded one."""
    z = torch.randn(5, 1000).mul(4).bfloat16()
    labels = torch.randint(1000, (5,))
    value, _ = ts.log_prob(ts.distribution(z), labels)
    exact = z.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=0)


def test_improbable_label_is_finite() -> None:
    """A label whose probability underflows in float32 keeps its log-probability and its slope."""
    z = torch.zeros(1, 10)
    z[0, 3] = 500.0
    value, slope = ts.log_prob(ts.distribution(z), torch.tensor([0]))
    assert value.item() == pytest.approx(-500.0) and slope is not None
    assert slope[0, 0].item() == pytest.approx(1.0) and slope[0, 3].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("name", ["entropy", *DIVERGENCES])
def test_forbidden_tokens_do_not_make_nan(name: str) -> None:
    """Logits of -inf (a masked class, a padded vocabulary) are tokens of probability zero in both distributions."""
    torch.manual_seed(1)
    z, q = torch.randn(3, 9), torch.randn(3, 9)
    z[:, 4] = q[:, 4] = -torch.inf
    keep = [i for i in range(9) if i != 4]
    p, other = ts.distribution(z), ts.distribution(q)
    small, small_other = ts.distribution(z[:, keep]), ts.distribution(q[:, keep])
    value, slope = getattr(ts, name)(p, *(() if name == "entropy" else (other,)))
    expected, expected_slope = getattr(ts, name)(small, *(() if name == "entropy" else (small_other,)))
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(slope[:, keep], expected_slope, atol=1e-5, rtol=0)
    assert (slope[:, 4] == 0).all()


def test_top_k_and_rest_sum_to_one() -> None:
    """Kept and remaining mass are one, the kept tokens are the most likely, also where the model is nearly sure."""
    torch.manual_seed(2)
    z = torch.randn(6, 50, dtype=torch.float64) * torch.tensor([1, 2, 4, 8, 16, 32.0], dtype=torch.float64)[:, None]
    logp, index, rest = ts.top_k(ts.distribution(z), 5)
    exact = z.log_softmax(-1)
    torch.testing.assert_close(logp, exact.sort(-1, descending=True).values[:, :5])
    torch.testing.assert_close(exact.gather(-1, index), logp)
    mask = torch.ones_like(z, dtype=torch.bool).scatter(-1, index, False)
    torch.testing.assert_close(rest, exact.masked_fill(~mask, -torch.inf).logsumexp(-1))


def test_is_top() -> None:
    """A label is a hit when nothing is likelier, ties included."""
    z = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [1.0, 0.0, 0.5]])
    assert ts.is_top(ts.distribution(z), torch.tensor([1, 1, 2])).tolist() == [True, True, False]


@pytest.mark.parametrize("k", [1, 4, 41])
def test_kept_tokens_and_the_rest_are_events_of_one_kl(k: int) -> None:
    """Value and slope against autograd of sum_i q_i log q_i/p_i over the kept tokens and the rest as one more event."""
    torch.manual_seed(0)
    z, q = torch.randn(7, 41, dtype=torch.float64) * 3, torch.randn(7, 41, dtype=torch.float64) * 3
    kept = ts.TopK(*ts.top_k(ts.distribution(q, 0.7), k))
    exact = (z / 0.7).requires_grad_()
    events = []
    for logits in (q / 0.7, exact):
        probs = logits.softmax(-1)
        rest = probs.scatter(-1, kept.tokens, 0.0).sum(-1, keepdim=True)
        events.append(torch.cat([probs.gather(-1, kept.tokens), rest], -1).clamp_min(1e-300))
    expected = (events[0] * (events[0] / events[1]).log()).sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    value, gradient = ts.top_k_kl(ts.distribution(z, 0.7), kept)
    assert gradient is not None
    torch.testing.assert_close(value, expected.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(gradient, slope, atol=1e-10, rtol=0)
    if k == 41:
        whole, steepness = ts.forward_kl(ts.distribution(z, 0.7), ts.distribution(q, 0.7))
        torch.testing.assert_close(value, whole, atol=1e-10, rtol=0)
        torch.testing.assert_close(gradient, steepness, atol=1e-10, rtol=0)
    else:
        assert (value <= ts.forward_kl(ts.distribution(z, 0.7), ts.distribution(q, 0.7))[0] + 1e-12).all()


def test_kept_tokens_of_the_model_itself_cost_nothing() -> None:
    z = torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = ts.distribution(z)
    value, gradient = ts.top_k_kl(p, ts.TopK(*ts.top_k(p, 3)))
    assert value.abs().max() < 1e-12 and gradient is not None and gradient.abs().max() < 1e-12


def test_draws_are_right_on_average() -> None:
    """Shares add up to 1, tokens are different, and the mean gradient of many draws is that of the whole distribution."""
    generator = torch.Generator().manual_seed(0)
    teacher = ts.distribution(torch.randn(1, 40, generator=generator, dtype=torch.float64) * 2)
    student = ts.distribution(torch.randn(1, 40, generator=generator, dtype=torch.float64).expand(4000, -1))
    many = ts.Distribution(*(x.expand(4000, -1) for x in teacher))
    kept = ts.drawn(many, 12, generator)
    assert kept.tokens.shape == (4000, 12) and all(len(set(row)) == 12 for row in kept.tokens[:50].tolist())
    torch.testing.assert_close(kept.logprob.exp().sum(-1), torch.ones(4000, dtype=torch.float64))
    value, gradient = ts.top_k_kl(student, kept)
    shares = torch.zeros(4000, 40, dtype=torch.float64).scatter_(-1, kept.tokens, kept.logprob.exp())
    log_q = shares.clamp(min=1e-300).log()
    torch.testing.assert_close(value, (shares * (log_q - student.logits.log_softmax(-1))).sum(-1))
    torch.testing.assert_close(gradient, student.probs - shares)
    expected = (student.probs[:1] - teacher.probs)[0]
    error = gradient.std(0) / 4000**0.5
    assert bool(((gradient.mean(0) - expected).abs() < 5 * error + 1e-12).all())
    biased = ts.top_k_kl(ts.Distribution(*(x[:1] for x in student)), ts.TopK(*ts.top_k(teacher, 12)))[1][0]
    assert float((biased - expected).abs().max()) > float((gradient.mean(0) - expected).abs().max())


def test_more_draws_than_tokens() -> None:
    p = ts.distribution(torch.tensor([[0.0, 3.0, -2.0]]))
    kept = ts.drawn(p, 10_000, torch.Generator().manual_seed(1))
    assert kept.tokens.shape == (1, 3)
    torch.testing.assert_close(
        torch.zeros(1, 3).scatter_(-1, kept.tokens, kept.logprob.exp()), p.probs, atol=0.02, rtol=0
    )
