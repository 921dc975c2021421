"""Quadratic programs of a handful of unknowns, solved exactly: what gradient surgery needs of a Gram matrix.

All matrices are (K, K) Gram matrices of K gradients, positive semidefinite, in float64; K is the number of tasks.
"""

from __future__ import annotations

import numpy as np

_EPS = 1e-12


def nonnegative_quadratic(Q: np.ndarray, c: np.ndarray) -> np.ndarray:  # noqa: N803 (as in textbooks)
    """Argmin of ``x'Qx / 2 + c'x`` over x >= 0, by an active set (Lawson and Hanson, 1974, chapter 23).

    Args:
        Q: (K, K) positive semidefinite.
        c: (K,); where Q has a direction without curvature, c must not fall along it.

    Returns:
        (K,) at least 0.
    """
    K = len(c)  # noqa: N806 (tasks)
    scale = max(float(np.abs(Q).max()), _EPS)
    x, free = np.zeros(K), np.zeros(K, dtype=bool)
    tolerance = 1e-11 * max(float(np.abs(c).max()), scale)
    for _ in range(10 * K + 10):
        slope = Q @ x + c
        wanted = np.where(free, np.inf, slope)
        entering = int(wanted.argmin())
        if wanted[entering] >= -tolerance:
            break
        free[entering] = True
        while True:
            inner = np.linalg.lstsq(Q[np.ix_(free, free)], -c[free], rcond=1e-13)[0]
            if (inner > 0).all():
                x[:] = 0.0
                x[free] = inner
                break
            # As far towards it as all stay at least 0; the first to reach 0 leaves.
            at = x[free]
            falling = inner <= 0
            step = float(np.min(at[falling] / np.maximum(at[falling] - inner[falling], _EPS)))
            moved = at + step * (inner - at)
            moved[falling & (moved <= _EPS * max(1.0, float(at.max())))] = 0.0
            x[free] = moved
            free &= x > 0
            x[~free] = 0.0
            if not free.any():
                break
    return x


def min_norm_weights(gram: np.ndarray) -> np.ndarray:
    """Weights of the shortest vector in the convex hull of K vectors: argmin of ``w'Gw``, w >= 0, sum w = 1.

    Solved as ``min |x'G x + (sum x - 1)^2|`` over x >= 0, whose solution is w times a positive number (Wolfe, 1976).

    Args:
        gram: (K, K), G.

    Returns:
        (K,).
    """
    scale = float(np.trace(gram)) / len(gram)
    if scale <= 0:
        return np.full(len(gram), 1.0 / len(gram))
    if len(gram) == 2:  # between two vectors: where the line through them is nearest to zero
        between = float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])
        first = min(max(float(gram[1, 1] - gram[0, 1]) / between, 0.0), 1.0) if between > 0 else 0.5
        return np.array([first, 1.0 - first])
    x = nonnegative_quadratic(gram / scale + 1.0, -np.ones(len(gram)))
    return x / x.sum()


__all__ = ["min_norm_weights", "nonnegative_quadratic"]
