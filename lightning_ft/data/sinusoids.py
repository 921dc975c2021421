"""Sine waves as tasks, the standard first test of meta-learning for regression (Finn et al., 2017, section 5.1)."""

from __future__ import annotations

import math

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sinusoids(
    rng: np.random.Generator,
    count: int,
    *,
    shot: int = 10,
    query: int = 10,
    max_phase: float = math.pi,
    grid: int | None = None,
) -> Arrays:
    """``count`` tasks y = a sin(x - p), a from U[0.1, 5], p from U[0, ``max_phase``], x from U[-5, 5].

    Args:
        rng: what to draw from.
        count: tasks.
        shot: support points of each.
        query: query points of each.
        max_phase: pi in Finn et al.; 2 pi in Nichol et al., 2018.
        grid: as in Nichol et al.: x are ``shot`` of so many points at even distances, and the query points are all of these.

    Returns:
        support x and y (count, shot, 1), query x and y (count, query, 1).
    """
    amplitude = rng.uniform(0.1, 5.0, (count, 1, 1))
    phase = rng.uniform(0.0, max_phase, (count, 1, 1))
    if grid is not None:
        even = np.broadcast_to(np.linspace(-5.0, 5.0, grid)[:, None], (count, grid, 1))
        chosen = rng.random((count, grid)).argsort(1)[:, :shot, None]
        x = np.take_along_axis(even, chosen, 1)
        return x, amplitude * np.sin(x - phase), even, amplitude * np.sin(even - phase)
    x = rng.uniform(-5.0, 5.0, (count, shot + query, 1))
    y = amplitude * np.sin(x - phase)
    return x[:, :shot], y[:, :shot], x[:, shot:], y[:, shot:]


__all__ = ["sinusoids"]
