"""What is said of earlier rows: the softened divergence by hand, and where softmax itself is nothing."""

import math

import pytest
import torch

from lightning_ft.functional.soft_targets import logit_distance_sum, softened_kl_sum


def test_by_hand():
    """At T = 2: p = (3, 1) / 4, q = (1, 1) / 2; T^2 KL = 4 (3/4 ln 3/2 + 1/4 ln 1/2)."""
    z, h = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.tensor([[5.0, 5.0]])
    wanted = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_kl_sum(h, z, 2.0).item() == pytest.approx(wanted, rel=1e-6)
    assert logit_distance_sum(h, torch.tensor([[4.0, 7.0]])).item() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_that_vanish_leave_a_finite_loss_and_gradient(dtype):
    """Trap 10: softmax().log() is minus infinity here, and 0 times that no number."""
    h = torch.tensor([[500.0, 0.0, -500.0], [-300.0, 300.0, 0.0]], dtype=dtype, requires_grad=True)
    z = torch.tensor([[-500.0, 0.0, 500.0], [300.0, -300.0, 0.0]], dtype=dtype)
    assert not torch.isfinite(torch.softmax(h / 2, 1).log()).all(), "the trap is one"
    value = softened_kl_sum(h, z, 2.0)
    value.backward()
    assert bool(torch.isfinite(value)) and value.item() == pytest.approx(4 * (500 + 300), rel=1e-2)
    assert bool(torch.isfinite(h.grad).all()) and h.grad[0, 0].item() == pytest.approx(2.0, rel=1e-2)
