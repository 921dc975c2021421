"""The gradient of a start through the place where adapting from it ends, without the way there (iMAML).

With ``phi* = argmin_phi L_s(phi) + lam / 2 |phi - theta|^2`` and H the Hessian of L_s at phi*, the implicit function theorem gives

    d L_q(phi*) / d theta = (1 + H / lam)^{-1} grad L_q(phi*)

(Rajeswaran et al., 2019, lemma 1), which conjugate gradients solve with a few products H v and no inner step kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Vector = list[Tensor]


def conjugate_gradient(product: Callable[[Vector], Vector], right: Sequence[Tensor], steps: int) -> Vector:
    """X with A x = right, by so many steps of conjugate gradients from zero (Hestenes and Stiefel, 1952).

    Args:
        product: v -> A v, A symmetric and positive definite.
        right: the right-hand side, in parts.
        steps: at most; exact after as many as A has different eigenvalues.
    """
    x = [torch.zeros_like(part) for part in right]
    rest, way = list(right), list(right)
    size = dot(rest, rest)
    start = float(size)
    for _ in range(steps):
        if float(size) <= 1e-20 * start:  # solved, to rounding
            break
        moved = product(way)
        length = size / dot(way, moved)
        x = [a + length * b for a, b in zip(x, way, strict=True)]
        rest = [a - length * b for a, b in zip(rest, moved, strict=True)]
        before, size = size, dot(rest, rest)
        way = [a + size / before * b for a, b in zip(rest, way, strict=True)]
    return x


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product over all parts."""
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def implicit_gradient(
    inner: Tensor, phi: Sequence[Tensor], slope: Sequence[Tensor], others: Sequence[Tensor], *, lam: float, steps: int
) -> tuple[Vector, Vector]:
    """What the query loss's gradient at phi* is to the start, and to parameters that do not adapt.

    Args:
        inner: the support loss at phi*, without the pull to the start, with a graph that can be differentiated twice.
        phi: the adapted weights, leaves of that graph.
        slope: gradient of the query loss with respect to phi.
        others: parameters in the graph that do not adapt.
        lam: strength of the pull.
        steps: of conjugate gradients.

    Returns:
        d L_q / d theta, one for each of ``phi``; what comes to ``others`` through phi*, beside their direct gradient.
    """
    grads = torch.autograd.grad(inner, phi, create_graph=True, allow_unused=True, materialize_grads=True)
    bent = [g for g in grads if g.requires_grad]  # a weight on which the loss depends linearly has no curvature

    def along(v: Sequence[Tensor], of: Sequence[Tensor]) -> Vector:
        chosen = [part for part, g in zip(v, grads, strict=True) if g.requires_grad]
        if not bent or not of:
            return [torch.zeros_like(part) for part in of]
        found = torch.autograd.grad(
            bent, of, grad_outputs=chosen, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(found)

    solved = conjugate_gradient(
        lambda v: [a + b / lam for a, b in zip(v, along(v, phi), strict=True)], list(slope), steps
    )
    return solved, [-part / lam for part in along(solved, others)]


__all__ = ["conjugate_gradient", "implicit_gradient"]
