"""An inner loop of which no graph is kept, by plain steps, or by Adam without momentum as Reptile takes them.

    sgd:   phi <- phi - lr g
    adam:  v <- .999 v + .001 g^2,    phi <- phi - lr g / (sqrt(v / (1 - .999^t)) + 1e-8),    t = 1, 2, ...

(Nichol et al., 2018, section 6.1: Adam with beta_1 = 0.) Their state begins anew in each task. No graph goes through the steps, so
they are taken in place, on a copy of the start: over millions of weights the memory that is written costs more than the sums. A
sparse gradient, such as that of an embedding of which a task holds few rows, moves these rows alone: where g is zero, so is a step
of either optimizer, and v catches up when the row is met again.
"""

from __future__ import annotations

import math
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
        slopes_of: (number of the step from 0, weights) -> the gradient there, of which one of a matrix may be sparse.
        theta: the start, which stays as it is.
        lr: rate.
        steps: how many.
        optimizer: ``sgd`` or ``adam``.

    Yields:
        From the first step on the same tensors, which the next step changes; clone what has to last.
    """
    phi = {name: weight.detach() for name, weight in theta.items()}
    squares: dict[str, _Squares] = {}
    yield phi
    for step in range(steps):
        slopes = slopes_of(step, phi)
        if not step:
            phi = {name: _copied(weight, slopes[name]) for name, weight in phi.items()}
        for name, weight in phi.items():
            slope = slopes[name].coalesce() if slopes[name].is_sparse else slopes[name]
            if optimizer == "sgd":
                weight.add_(slope, alpha=-lr)
            elif slope.is_sparse:
                rows, values = slope.indices()[0], slope.values()
                root = squares.setdefault(name, _Squares(weight)).root_of_rows(rows, values, step + 1)
                weight.index_add_(0, rows, values / root, alpha=-lr)
            else:
                root = squares.setdefault(name, _Squares(weight)).root(slope, step + 1)
                weight.addcdiv_(slope, root, value=-lr)
        yield phi


def _copied(weight: Tensor, slope: Tensor) -> Tensor:
    """A copy that is mapped over tasks where the gradient is (`torch.vmap`), so that it may change in place."""
    return weight.clone() if slope.is_sparse else torch.zeros_like(slope).add_(weight)


class _Squares:
    """The running mean of squared gradients of a weight; of rows that were not met since, as it was when they were."""

    def __init__(self, weight: Tensor) -> None:
        self._mean = torch.zeros_like(weight)
        self._all = 0  # the step that all rows were at last
        self._steps: Tensor | None = None  # and each, where some were met since

    def root(self, slope: Tensor, step: int) -> Tensor:
        """What a step's gradient is divided by."""
        if self._steps is not None:
            self._mean.mul_((_BETA ** (step - 1 - self._steps).to(slope.dtype))[:, None])
            self._steps = None
        self._all = step
        self._mean.mul_(_BETA).addcmul_(slope, slope, value=1 - _BETA)
        return self._mean.sqrt().mul_(1 / math.sqrt(1 - _BETA**step)).add_(_EPS)

    def root_of_rows(self, rows: Tensor, values: Tensor, step: int) -> Tensor:
        """The same of rows (n) with gradients (n, D)."""
        if self._steps is None:
            self._steps = rows.new_full((len(self._mean),), self._all)
        since = _BETA ** (step - self._steps[rows]).to(values.dtype)
        mean = self._mean[rows].mul_(since[:, None]).addcmul_(values, values, value=1 - _BETA)
        self._mean[rows], self._steps[rows] = mean, step
        return mean.sqrt().mul_(1 / math.sqrt(1 - _BETA**step)).add_(_EPS)


__all__ = ["InnerOptimizer", "descend"]
