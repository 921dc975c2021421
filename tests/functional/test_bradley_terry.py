"""Bradley-Terry's loss against its formula in float64, and the calibration error against torchmetrics'."""

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lightning_ft.engine.reward_evaluation import Calibration
from lightning_ft.functional.bradley_terry import bins_of, bradley_terry, centring

PAIRS = [(2.0, -1.0), (0.3, 0.3), (-40.0, 40.0), (900.0, -900.0)]


@pytest.mark.parametrize("margin", [None, 1.5])
def test_loss_is_the_negative_log_of_the_chance_that_the_chosen_one_wins(margin):
    chosen, rejected = torch.tensor(PAIRS, dtype=torch.float64).T
    given = None if margin is None else torch.full_like(chosen, margin)
    found = bradley_terry(chosen, rejected, given)
    for (w, lose), loss in zip(PAIRS, found.tolist(), strict=True):
        ahead = w - lose - (margin or 0.0)
        assert loss == pytest.approx(math.log1p(math.exp(-abs(ahead))) + max(-ahead, 0.0), rel=1e-12, abs=1e-300)


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    r, s, m = (torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(bradley_terry, (r, s, m))
    assert torch.autograd.gradcheck(centring, (r, s))
    (slope,) = torch.autograd.grad(bradley_terry(r, s).sum(), r)
    torch.testing.assert_close(slope, -torch.sigmoid(s - r))


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_calibration_is_that_of_the_choice_with_its_confidence(bins):
    ahead = 3 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    metric = Calibration(bins)
    for part in ahead.split([0, 200, 1, 299]):
        metric.update(part)
    confidence, right = ahead.abs().sigmoid(), (ahead > 0).long()
    expected = binary_calibration_error(confidence, right, n_bins=2 * bins, norm="l1")  # half of its bins are below 1/2
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-6) and float(expected) > 0.01


def test_a_tie_is_half_right_and_certainty_is_in_the_last_bin():
    metric = Calibration(10)
    metric.update(torch.zeros(3))
    assert float(metric.compute()) == 0.0
    assert bins_of(torch.tensor([0.5, 1.0]), 10).tolist() == [0, 9]
