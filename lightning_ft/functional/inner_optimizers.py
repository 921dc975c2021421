"""Optimizers of an inner loop whose graph is not kept: plain steps, or Adam without momentum as Reptile takes them.

    sgd:   phi <- phi - lr g
    adam:  v <- .999 v + .001 g^2,    phi <- phi - lr g / (sqrt(v / (1 - .999^t)) + 1e-8),    t = 1, 2, ...

(Nichol et al., 2018, section 6.1: Adam with beta_1 = 0.) Their state begins anew in each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

InnerOptimizer = Literal["sgd", "adam"]
_BETA, _EPS = 0.999, 1e-8


def descend(
    slopes_of: Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]],
    theta: Mapping[str, Tensor],
    *,
    lr: float,
    steps: int,
    optimizer: InnerOptimizer,
) -> Iterator[dict[str, Tensor]]:
    """The weights before the first step and after each, without a graph.

    Args:
        slopes_of: (number of the step from 0, weights) -> the gradient there.
        theta: the start.
        lr: rate.
        steps: how many.
        optimizer: ``sgd`` or ``adam``.
    """
    phi = {name: weight.detach() for name, weight in theta.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in phi.items()} if optimizer == "adam" else {}
    yield phi
    for step in range(steps):
        slopes = slopes_of(step, phi)
        if optimizer == "sgd":
            phi = {name: weight - lr * slopes[name] for name, weight in phi.items()}
        else:
            squares = {n: _BETA * v + (1 - _BETA) * slopes[n].square() for n, v in squares.items()}
            unbias = 1 - _BETA ** (step + 1)
            phi = {n: w - lr * slopes[n] / ((squares[n] / unbias).sqrt() + _EPS) for n, w in phi.items()}
        yield phi


__all__ = ["InnerOptimizer", "descend"]
