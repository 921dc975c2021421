"""Gradient surgery: one step for K tasks whose gradients disagree, from the Gram matrix of their gradients alone.

``d = sum_i w_i g_i``, and each method is a map from ``G_ij = g_i . g_j`` (K, K) to the weights w (K,), computed in float64:

    pcgrad  g_i loses its component along each g_j that it opposes, in random order; the results are added up
            (Yu et al., 2020, algorithm 1)
    mgda    the shortest vector in the convex hull of the gradients (Desideri, 2012; Sener and Koltun, 2018)
    cagrad  argmax_d min_i g_i . d with |d - g_0| <= c |g_0|, g_0 the mean gradient (Liu et al., 2021, equation 3)
    nash    G w = 1 / w, element by element: the bargaining solution (Navon et al., 2022, claim 3.1)
    upgrad  each gradient projected onto the cone of directions that harm no task; their mean (Quinton and Rey, 2024)
    gradvac g_i moves towards each g_j until their cosine is what it is on average, in random order; the results are added up
            (Wang et al., 2021, algorithm 1)
    aligned the sum of the nearest gradients that are orthogonal and equally long, as long as the least singular value
            (Senushkin et al., 2023, algorithm 1)

Every gradient with a norm of zero must be left out before (a task that has no row in a step): it would be its own compromise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_ft.functional.min_norm import min_norm_weights, nonnegative_quadratic

Method = Literal["pcgrad", "gradvac", "cagrad", "mgda", "nash", "upgrad", "aligned", "sum"]
"""``sum`` is no surgery: all weights are 1."""


def pcgrad(gram: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad's weights of the sum; for gradients without conflict all are 1.

    Args:
        gram: (K, K).
        generator: draws the order in which each gradient meets the others; None: as they come.

    Returns:
        (K,), float64. Divided by K they give the mean, which some implementations step with.
    """
    G = _float64(gram)  # noqa: N806 (the paper's)
    K = len(G)  # noqa: N806
    total = np.zeros(K)
    for i in range(K):
        v = np.zeros(K)
        v[i] = 1.0
        for j in _order(K, generator):
            product = float(v @ G[:, j]) if j != i else 0.0
            if product < 0:
                v[j] -= product / G[j, j]
        total += v
    return torch.from_numpy(total)


def gradvac(
    gram: Tensor, target: Tensor, beta: float = 0.01, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient Vaccine's weights of the sum: PCGrad whose bound is not 0 but what a pair's cosine is on average.

    Where the cosine p of g_i, as it is by then, and g_j lies below its target q, ``g_i += a g_j`` with
    ``a = |g_i| (q sqrt(1 - p^2) - p sqrt(1 - q^2)) / (|g_j| sqrt(1 - q^2))`` makes it q. Then q moves by beta towards p.

    Args:
        gram: (K, K).
        target: (K, K) cosines, zero at first; a target above 0.999 counts as that, since in few dimensions it may be out of reach.
        beta: share of the newest cosine.
        generator: as of `pcgrad`.

    Returns:
        (K,) weights and the (K, K) new targets, float64.
    """
    G = _float64(gram)  # noqa: N806
    K = len(G)  # noqa: N806
    lengths = np.sqrt(np.diag(G))
    found: np.ndarray = target.detach().cpu().double().numpy().copy()
    total = np.zeros(K)
    for i in range(K):
        v = np.zeros(K)
        v[i] = 1.0
        for j in _order(K, generator):
            length = float(np.sqrt(max(v @ G @ v, 0.0)))
            if j == i or length <= 1e-12 * lengths[i]:
                continue
            p, q = min(1.0, max(-1.0, float(v @ G[:, j]) / (length * lengths[j]))), min(float(found[i, j]), 0.999)
            if p < q:
                v[j] += length / lengths[j] * (q * np.sqrt((1 - p * p) / (1 - q * q)) - p)
            found[i, j] += beta * (p - found[i, j])
        total += v
    return torch.from_numpy(total), torch.from_numpy(found)


def mgda(gram: Tensor) -> Tensor:
    """Weights of the shortest convex combination; they add up to 1. At a Pareto stationary point it is zero."""
    return torch.from_numpy(min_norm_weights(_float64(gram)))


def cagrad(gram: Tensor, c: float = 0.5, *, rescale: bool = True) -> Tensor:
    """CAGrad's weights: ``d = g_0 + c |g_0| g_w / |g_w|``, near the mean, and best for the task that gains least.

    With w in the simplex, ``min_w g_w . g_0 + c |g_0| |g_w|`` is solved as a sequence of shortest-vector problems: the solution
    is the shortest combination of ``g_i + a g_0`` for the a with ``|g_w| = a c |g_0|``, a root of a falling function.

    Args:
        gram: (K, K).
        c: radius of the ball around the mean, as a share of its norm: 0 is the mean; from 1 on it finds stationary points, not
            minima of the mean.
        rescale: divide by 1 + c, as the authors' code does.

    Returns:
        (K,), float64.
    """
    G = _float64(gram)  # noqa: N806
    K = len(G)  # noqa: N806
    mean = np.full(K, 1.0 / K)
    b = G @ mean  # (K,), g_i . g_0
    radius = c * float(np.sqrt(max(mean @ b, 0.0)))
    if radius <= 1e-12 * float(np.sqrt(np.trace(G))):
        return torch.from_numpy(mean)

    def solve(a: float) -> tuple[np.ndarray, float]:
        w = min_norm_weights(G + a * (b[:, None] + b[None, :]) + a * a * float(mean @ b))
        return w, float(np.sqrt(max(w @ G @ w, 0.0)))

    low, high = 0.0, float(np.sqrt(np.diag(G).max())) / radius
    w, norm = solve(high)
    below, above = solve(low)[1], norm - high * radius  # of |g_w| - a c |g_0|
    for _ in range(200):
        if above >= 0 or high - low <= 1e-14 * high:
            break
        a = low + (high - low) * below / (below - above)  # the secant, and where it creeps, the middle
        if not low + 0.01 * (high - low) < a < high - 0.01 * (high - low):
            a = 0.5 * (low + high)
        w, norm = solve(a)
        value = norm - a * radius
        if abs(value) <= 1e-13 * norm:
            break
        low, below, high, above = (a, value, high, above) if value > 0 else (low, below, a, value)
    if norm <= 1e-9 * float(
        np.sqrt(np.trace(G))
    ):  # none in the ball helps all: the nearest to the mean that harms none
        weights = mean + nonnegative_quadratic(G / np.trace(G), b / np.trace(G))
    else:
        weights = mean + radius / norm * w
    return torch.from_numpy(weights / (1.0 + c) if rescale else weights)


def nash(gram: Tensor) -> Tensor:
    """Nash-MTL's weights, the positive solution of ``G w = 1 / w``: each task gains the more, the smaller its weight.

    The minimum of ``w'Gw / 2 - sum log w`` by damped Newton steps. ``|d| = sqrt(K)`` whatever the gradients' size,
    so the step is that of the learning rate. At a Pareto stationary point no solution exists; a ridge of 1e-9 of the mean squared
    norm gives one there, with a short d.

    Args:
        gram: (K, K).

    Returns:
        (K,), float64, positive.
    """
    G = _float64(gram)  # noqa: N806
    scale = np.sqrt(np.maximum(np.diag(G), 1e-300))
    C = G / np.outer(scale, scale) + 1e-9 * np.eye(len(G))  # noqa: N806 (cosines: equally scaled unknowns)
    x = np.ones(len(G))

    for _ in range(100):
        slope = C @ x - 1.0 / x
        step = -np.linalg.solve(C + np.diag(1.0 / x**2), slope)
        decrement = float(np.sqrt(max(-slope @ step, 0.0)))
        # A self-concordant function: this step stays positive, falls until it is near, and then converges quadratically.
        x = x + (step if decrement < 0.25 else step / (1.0 + decrement))
        if decrement < 1e-10:
            break
    return torch.from_numpy(x / scale)


def upgrad(gram: Tensor) -> Tensor:
    """UPGrad's weights: of each gradient the nearest direction that opposes none, then their mean; no task is harmed.

    Projecting g_i onto the dual cone is ``min_v v'Gv`` over ``v >= e_i``.

    Args:
        gram: (K, K).

    Returns:
        (K,), float64, at least 1 / K.
    """
    G = _float64(gram)  # noqa: N806
    K = len(G)  # noqa: N806
    G = G / max(float(np.trace(G)) / K, 1e-300)  # noqa: N806
    total = np.ones(K)
    for i in range(K):
        total += nonnegative_quadratic(G, G[:, i])
    return torch.from_numpy(total / K)


def aligned(gram: Tensor) -> Tensor:
    """Aligned-MTL's weights: ``sqrt(l) U L^(-1/2) U' / K`` summed over tasks, G = U L U' and l the least eigenvalue above zero.

    Args:
        gram: (K, K).

    Returns:
        (K,), float64. The step is short where gradients nearly agree or nearly cancel: its length is that of l.
    """
    G = _float64(gram)  # noqa: N806
    K = len(G)  # noqa: N806
    values, vectors = np.linalg.eigh(G)
    kept = values > values[-1] * K * np.finfo(np.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    if not len(values):
        return torch.full((K,), 1.0 / K, dtype=torch.float64)
    return torch.from_numpy(np.sqrt(values[0]) * (vectors / np.sqrt(values)) @ vectors.mean(0))


METHODS: dict[str, Callable[[Tensor], Tensor]] = {"mgda": mgda, "nash": nash, "upgrad": upgrad, "aligned": aligned}
"""Those without settings; `pcgrad` and `gradvac` take a generator, `cagrad` its c."""


def conflict_rate(gram: Tensor) -> float:
    """Share of the pairs of tasks whose gradients form an obtuse angle; 0 for a single task."""
    K = len(gram)  # noqa: N806
    if K < 2:
        return 0.0
    pairs = torch.triu(torch.ones(K, K, dtype=torch.bool, device=gram.device), diagonal=1)
    return float((gram[pairs] < 0).double().mean())


def _order(count: int, generator: torch.Generator | None) -> Sequence[int]:
    """In which a gradient meets the others."""
    if generator is None:
        return range(count)
    drawn: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return drawn


def _float64(gram: Tensor) -> np.ndarray:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix is square, got the shape {tuple(gram.shape)}")
    found: np.ndarray = gram.detach().cpu().double().numpy()
    return 0.5 * (found + found.T)


__all__ = ["METHODS", "Method", "aligned", "cagrad", "conflict_rate", "gradvac", "mgda", "nash", "pcgrad", "upgrad"]
