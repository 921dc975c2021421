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
    same_points: bool = False,
) -> Arrays:
    """``count`` tasks y = a sin(x - p), a from U[0.1, 5], p from U[0, ``max_phase``], x from U[-5, 5].

    Args:
        rng: what to draw from.
        count: tasks.
        shot: support points of each.
        query: query points of each.
        max_phase: pi in Finn et al.; 2 pi in Nichol et al., 2018.
        same_points: query points are the support points, as Reptile has no query set.

    Returns:
        support x and y (count, shot, 1), query x and y (count, query, 1).
    """
    amplitude = rng.uniform(0.1, 5.0, (count, 1, 1))
    phase = rng.uniform(0.0, max_phase, (count, 1, 1))
    x = rng.uniform(-5.0, 5.0, (count, shot if same_points else shot + query, 1))
    y = amplitude * np.sin(x - phase)
    if same_points:
        return x, y, x, y
    return x[:, :shot], y[:, :shot], x[:, shot:], y[:, shot:]


__all__ = ["sinusoids"]
