"""The implicit gradient: of a quadratic loss against its closed form, of any net against differences of long inner runs."""

import pytest
import torch

from lightning_ft.functional.implicit_gradient import conjugate_gradient, implicit_gradient


def test_conjugate_gradients_solve():
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, right = root @ root.t() + torch.eye(6), torch.randn(6, dtype=torch.float64)
    parts = [right[:2], right[2:]]

    def product(v):
        return list((matrix @ torch.cat(v)).split([2, 4]))

    found = torch.cat(conjugate_gradient(product, parts, 6))
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-10)
    assert float((matrix @ torch.cat(conjugate_gradient(product, parts, 2)) - right).norm()) < float(right.norm())
    assert not torch.cat(conjugate_gradient(product, [torch.zeros(2), torch.zeros(4)], 3)).any()


@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_of_a_quadratic_loss_it_is_that_of_the_closed_form(lam):
    """phi* = (2 X'X / n + lam)^-1 (2 X'y / n + lam theta), differentiated by autograd; a parameter beside scales X."""
    torch.manual_seed(1)
    x, q = torch.randn(8, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y, t = torch.randn(8, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    a = 2 * (scale * x).t() @ (scale * x) / 8 + lam * torch.eye(3)
    best = torch.linalg.solve(a, 2 * (scale * x).t() @ y / 8 + lam * theta)
    expected = torch.autograd.grad((scale * q @ best - t).square().mean(), [theta, scale])
    phi = best.detach().requires_grad_()
    slope, direct = torch.autograd.grad((scale * q @ phi - t).square().mean(), [phi, scale])
    inner = (scale * x @ phi - y).square().mean()
    (solved,), (beside,) = implicit_gradient(inner, [phi], [slope], [scale], lam=lam, steps=8)
    torch.testing.assert_close(solved, expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(direct + beside, expected[1], rtol=1e-6, atol=1e-9)
