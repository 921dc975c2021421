"""The inner loop of meta-learning: a few steps of gradient descent on a task, through which the start can be learned.

    phi_0 = theta,    phi_{j+1} = phi_j - alpha_j * grad L_support(phi_j),    j = 0 .. k-1

(Finn et al., 2017, section 2.2.) ``order`` 2 keeps the graph of each inner gradient, so that d phi_k / d theta holds the
Hessians of the support loss; ``order`` 1 takes those gradients for constants, so that d phi_k / d theta = 1. Rates alpha are
numbers, tensors of one value or tensors like the weight (Meta-SGD, Li et al., 2017, equation 2), and learn in either order:
d phi / d alpha = - grad.

Weights go in and out as dictionaries; nothing is written in place, and no module is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

Weights = dict[str, Tensor]
LossOf = Callable[[Weights], Tensor]
"""Weights -> a scalar loss of the support set."""
Order = Literal[1, 2]
Gradient = Callable[[LossOf, Weights, Order], Weights]


def inner_loop(
    loss_of: LossOf,
    theta: Mapping[str, Tensor],
    rates: Callable[[int], Mapping[str, Tensor | float]],
    *,
    steps: int,
    order: Order,
    gradient: Gradient | None = None,
) -> Iterator[Weights]:
    """The weights before the first step, and after each: ``steps + 1`` dictionaries.

    Args:
        loss_of: the support loss at given weights, a scalar; called once a step.
        theta: the start, by name; tensors that need a gradient keep their graph.
        rates: number of a step, from 0 -> the rate of each weight.
        steps: k; 0 yields the start alone.
        order: 1 or 2, see above.
        gradient: how a gradient is taken: `by_autograd` (None), or `by_transform`, which `torch.vmap` can map.
    """
    phi = dict(theta)
    yield phi
    take = gradient or by_autograd
    for j in range(steps):
        slopes, alpha = take(loss_of, phi, order), rates(j)
        phi = {name: _stepped(weight, slopes[name], alpha[name]) for name, weight in phi.items()}
        yield phi


def _stepped(weight: Tensor, slope: Tensor, rate: Tensor | float) -> Tensor:
    """``weight - rate * slope``, by one operation where the rate is a number."""
    return weight - rate * slope if isinstance(rate, Tensor) else torch.sub(weight, slope, alpha=rate)


def by_autograd(loss_of: LossOf, phi: Weights, order: Order) -> Weights:
    """The gradient of ``loss_of`` at ``phi`` by `torch.autograd.grad`; weights that the loss does not reach get zeros."""
    at = phi if order == 2 else {name: weight.detach().requires_grad_() for name, weight in phi.items()}
    at = {name: weight if weight.requires_grad else weight.detach().requires_grad_() for name, weight in at.items()}
    found = torch.autograd.grad(
        loss_of(at), list(at.values()), create_graph=order == 2, allow_unused=True, materialize_grads=True
    )
    return dict(zip(at, found, strict=True))


def by_transform(loss_of: LossOf, phi: Weights, order: Order) -> Weights:
    """The same by `torch.func.grad`, which may stand inside `torch.vmap`; without saved-tensor hooks (checkpointing)."""
    if order == 2:
        return torch.func.grad(loss_of)(phi)
    with torch.no_grad():  # the transform differentiates all the same, and nothing outside keeps a graph of it
        return torch.func.grad(loss_of)({name: weight.detach() for name, weight in phi.items()})


def multi_step_weights(steps: int, progress: float) -> list[float]:
    """Weights of the query losses after steps 1 .. k, which go from equal shares to nearly all on the last.

    At ``progress`` t: v_j = max((1 - t) / k, 0.03 / k) for j < k, and v_k = min((1 + t (k - 1)) / k, 1 - (k - 1) 0.03 / k)
    (Antoniou et al., 2019, section 4, with the floor of their code). They add up to 1.

    Args:
        steps: k, at least 1.
        progress: 0 at the beginning, 1 where the annealing is done.
    """
    floor, t = 0.03 / steps, min(max(progress, 0.0), 1.0)
    early = max((1 - t) / steps, floor)
    return [early] * (steps - 1) + [1 - early * (steps - 1)]


class _GivenGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.gradients = tensors[:count]  # type: ignore[attr-defined]
        return value.clone()

    @staticmethod
    def backward(ctx: object, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = ctx.gradients  # type: ignore[attr-defined]
        scaled = [None if g is None else (g * outer[0]).to(g.dtype) for g in gradients]
        return None, None, *[None for _ in gradients], *scaled


def with_gradients(value: Tensor, parameters: list[Tensor], gradients: list[Tensor | None]) -> Tensor:
    """A scalar of this value whose gradient is the one given: what was found task by task meets one backward pass.

    Args:
        value: a scalar; its own graph is left behind.
        parameters: leaves that are trained.
        gradients: of each, or None where there is none, which stays None.
    """
    given: Tensor = _GivenGradients.apply(value.detach(), len(gradients), *gradients, *parameters)  # type: ignore[no-untyped-call]
    return given


__all__ = [
    "Order",
    "Weights",
    "by_autograd",
    "by_transform",
    "inner_loop",
    "multi_step_weights",
    "with_gradients",
]
