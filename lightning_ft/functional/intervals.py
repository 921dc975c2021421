"""Confidence intervals of what is reported."""

from __future__ import annotations

import math


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = successes / n; unlike the normal interval it stays
    inside [0, 1] and is right for p near its ends (Wilson, 1927).

    Args:
        successes: how many of the ``n`` were right.
        n: how many there were; 0 gives (0, 1).
        z: quantile of the normal distribution, 1.96 for 95 %.
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))
