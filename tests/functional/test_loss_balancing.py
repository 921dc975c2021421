"""Loss balancing: each formula again in plain float64, or by autograd."""

import math

import pytest
import torch

from lightning_ft.functional.loss_balancing import dwa_weights, famo_slope, famo_weights, gradnorm_slope, uncertainty

LOSSES = torch.tensor([0.7, 3.0, 0.02], dtype=torch.float64)
FIRST = torch.tensor([1.5, 3.1, 0.9], dtype=torch.float64)


def test_uncertainty_is_the_gaussian_likelihood_of_a_squared_error() -> None:
    """With m = 1/2: - log N(y; f, sigma^2) without its constant; the minimum over s is log L."""
    s = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    found = uncertainty(LOSSES, s, torch.full((3,), 0.5, dtype=torch.float64))
    for value, loss, log_variance in zip(found.tolist(), LOSSES.tolist(), s.tolist(), strict=True):
        density = torch.distributions.Normal(0.0, math.exp(log_variance / 2))
        assert value == pytest.approx(
            -float(density.log_prob(torch.tensor(loss**0.5))) - 0.5 * math.log(2 * math.pi), abs=1e-6
        )
    at = LOSSES.log().requires_grad_(True)
    uncertainty(LOSSES, at, torch.full((3,), 0.5, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(at.grad, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_dwa_by_hand() -> None:
    ratios = [b / a for a, b in zip(FIRST.tolist(), LOSSES.tolist(), strict=True)]
    total = sum(math.exp(r / 2) for r in ratios)
    expected = torch.tensor([3 * math.exp(r / 2) / total for r in ratios], dtype=torch.float64)
    torch.testing.assert_close(dwa_weights(FIRST, LOSSES), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dwa_weights(FIRST, FIRST, 0.1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
def test_gradnorms_slope_is_autograds(alpha: float) -> None:
    w = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64, requires_grad=True)
    norms = torch.tensor([4.0, 0.3, 1.0], dtype=torch.float64)
    rate = LOSSES / FIRST
    target = ((w * norms).mean() * (rate / rate.mean()) ** alpha).detach()
    (w * norms - target).abs().sum().backward()
    torch.testing.assert_close(gradnorm_slope(w.detach(), norms, LOSSES, FIRST, alpha), w.grad, rtol=1e-12, atol=1e-12)


def test_gradnorm_without_pull_makes_gradients_alike() -> None:
    w, norms = torch.ones(3, dtype=torch.float64), torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64)
    for step in range(4000):
        w = (w - 1e-3 * (1 - step / 4000) * gradnorm_slope(w, norms, LOSSES, FIRST, 0.0)).clamp(min=1e-3)
        w = 3 * w / w.sum()
    assert float((w * norms).max() / (w * norms).min()) < 1.02


def test_famo_is_the_authors_loss() -> None:
    """Their loss is sum z log(L) / c with c = sum z / L held: its slope in L are the weights."""
    logits = torch.tensor([0.2, -0.3, 0.0], dtype=torch.float64)
    losses = LOSSES.clone().requires_grad_(True)
    z = torch.softmax(logits, 0)
    c = (z / losses).sum().detach()
    (losses.log() * z / c).sum().backward()
    torch.testing.assert_close(famo_weights(logits, LOSSES), losses.grad, rtol=1e-12, atol=0)


def test_famos_slope_is_autograds() -> None:
    """Their update: the gradient of softmax(x) . delta, beside Adam's weight decay gamma."""
    logits = torch.tensor([0.2, -0.3, 0.0], dtype=torch.float64, requires_grad=True)
    delta = FIRST.log() - LOSSES.log()
    (torch.softmax(logits, 0) * delta).sum().backward()
    expected = logits.grad + 1e-3 * logits.detach()
    torch.testing.assert_close(famo_slope(logits.detach(), FIRST, LOSSES), expected, rtol=1e-12, atol=1e-15)
