"""The inner loop against finite differences in float64, closed forms, and its own second way of differentiating."""

import math

import pytest
import torch
from torch import nn

from lightning_ft.functional.inner_loop import (
    by_autograd,
    by_transform,
    inner_loop,
    multi_step_weights,
    with_gradients,
)

STEPS = 3


@pytest.fixture
def task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y, xq, yq = (torch.randn(6, width, dtype=torch.float64) for width in (2, 1, 2, 1))

    def loss(weights, rows=(x, y)):
        return (torch.func.functional_call(net, weights, (rows[0],)) - rows[1]).square().mean()

    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    rates = {
        name: (0.3 * torch.rand(p.shape, dtype=torch.float64)).requires_grad_() for name, p in net.named_parameters()
    }
    return theta, rates, loss, lambda weights: loss(weights, (xq, yq))


def outer(theta, rates, loss, query, order, gradient=by_autograd, steps=STEPS):
    *_, phi = inner_loop(loss, theta, lambda j: rates, steps=steps, order=order, gradient=gradient)
    return query(phi)


def by_hand(theta, rates, loss, query):
    """The query loss after plain steps, with nothing but values."""
    phi = {name: weight.detach().clone() for name, weight in theta.items()}
    for _ in range(STEPS):
        leaves = {name: weight.clone().requires_grad_() for name, weight in phi.items()}
        value = loss(leaves)
        value.backward()
        phi = {name: weight - rates[name].detach() * leaves[name].grad for name, weight in phi.items()}
    return float(query(phi).detach())


@pytest.mark.parametrize("which", ["theta", "rates"])
@pytest.mark.parametrize("gradient", [by_autograd, by_transform])
def test_the_meta_gradient_is_the_finite_difference(task, gradient, which):
    theta, rates, loss, query = task
    moved = {"theta": theta, "rates": rates}[which]
    found = torch.autograd.grad(outer(theta, rates, loss, query, 2, gradient), list(moved.values()))
    for (name, tensor), slope in zip(moved.items(), found, strict=True):
        for place in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                other = {n: t.detach().clone() for n, t in moved.items()}
                other[name].view(-1)[place] += sign * 1e-6
                args = (other, rates) if which == "theta" else (theta, other)
                ends.append(by_hand(*args, loss, query))
            assert float(slope.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("gradient", [by_autograd, by_transform])
def test_first_order_is_the_query_gradient_at_the_adapted_weights(task, gradient):
    theta, rates, loss, query = task
    found = torch.autograd.grad(outer(theta, rates, loss, query, 1, gradient), list(theta.values()))
    *_, phi = inner_loop(loss, theta, lambda j: rates, steps=STEPS, order=2)
    phi = {name: weight.detach().requires_grad_() for name, weight in phi.items()}
    expected = torch.autograd.grad(query(phi), list(phi.values()))
    second = torch.autograd.grad(outer(theta, rates, loss, query, 2), list(theta.values()))
    for one, other, different in zip(found, expected, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
        assert float((one - different).abs().max()) > 1e-4


def test_first_order_rates_learn_from_the_constant_gradients(task):
    """d L / d alpha_j = - <grad L_query(phi_k), grad_j>, element by element."""
    theta, rates, loss, query = task
    found = torch.autograd.grad(outer(theta, rates, loss, query, 1, steps=1), list(rates.values()))
    slopes = by_autograd(loss, theta, 1)
    phi = {n: (w - rates[n] * slopes[n]).detach().requires_grad_() for n, w in theta.items()}
    at_end = torch.autograd.grad(query(phi), list(phi.values()))
    for name, one, slope in zip(theta, found, at_end, strict=True):
        torch.testing.assert_close(one, -slopes[name] * slope, rtol=1e-12, atol=1e-13)


def test_a_quadratic_by_hand():
    """L = (w - 3)^2 / 2 with alpha 1/2: the distance to 3 halves each step, so d phi_k / d theta = 2^-k; of order 1 it is 1."""
    theta = {"w": torch.tensor(7.0, dtype=torch.float64, requires_grad=True)}
    for order, slope in ((2, 1 / 8), (1, 1.0)):
        run = inner_loop(lambda p: (p["w"] - 3).square() / 2, theta, lambda j: {"w": 0.5}, steps=3, order=order)
        found = [float(phi["w"].detach()) for phi in run]
        assert found == [7.0, 5.0, 4.0, 3.5]
        *_, phi = inner_loop(lambda p: (p["w"] - 3).square() / 2, theta, lambda j: {"w": 0.5}, steps=3, order=order)
        (gradient,) = torch.autograd.grad(phi["w"], theta.values())
        assert float(gradient) == slope


def test_tasks_at_once_are_the_tasks_one_by_one(task):
    theta, rates, _, _ = task
    x, y = torch.randn(4, 6, 2, dtype=torch.float64), torch.randn(4, 6, 1, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def one(x, y, gradient):
        def loss(weights):
            return (torch.func.functional_call(net, weights, (x,)) - y).square().mean()

        return outer(theta, rates, loss, loss, 2, gradient)

    at_once = torch.vmap(lambda x, y: one(x, y, by_transform))(x, y)
    separate = torch.stack([one(a, b, by_autograd) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(at_once, separate, rtol=1e-12, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(at_once.sum(), list(theta.values())),
        torch.autograd.grad(separate.sum(), list(theta.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_weight_that_the_loss_does_not_reach_stays():
    theta = {"used": torch.ones(2, requires_grad=True), "unused": torch.ones(2, requires_grad=True)}
    *_, phi = inner_loop(
        lambda p: p["used"].square().sum(), theta, lambda j: dict.fromkeys(theta, 0.1), steps=2, order=2
    )
    torch.testing.assert_close(phi["unused"], torch.ones(2))
    assert float(phi["used"][0].detach()) == pytest.approx(0.64)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_multi_step_weights_add_up_and_go_to_the_last_step(steps):
    assert multi_step_weights(steps, 0.0) == pytest.approx([1 / steps] * steps)
    for progress in (0.0, 0.3, 1.0, 7.0):
        assert math.fsum(multi_step_weights(steps, progress)) == pytest.approx(1.0)
    end = multi_step_weights(steps, 1.0)
    assert end[-1] == pytest.approx(1 - 0.03 * (steps - 1) / steps)


def test_given_gradients_are_those_of_the_backward_pass():
    a, b, c = (torch.ones(3, requires_grad=True) for _ in range(3))
    value = with_gradients(torch.tensor(5.0), [a, b, c], [torch.arange(3.0), None, torch.full((3,), 2.0)])
    (value * 2).backward()
    assert float(value.detach()) == 5.0 and b.grad is None
    torch.testing.assert_close(a.grad, torch.tensor([0.0, 2.0, 4.0]))
    torch.testing.assert_close(c.grad, torch.full((3,), 4.0))
