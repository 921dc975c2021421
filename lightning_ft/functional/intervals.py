"""Confidence intervals of what is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
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


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of independent measurements, such as one score a seed.

    mean +- t_{n-1} s / sqrt(n), s with n - 1 in its denominator (Student, 1908).

    Args:
        values: two or more.
    """
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(n - 1) * deviation / math.sqrt(n)
    return mean - half, mean + half


@lru_cache(maxsize=256)  # of many thousand degrees it takes tenths of a second
def student_quantile(degrees: int, share: float = 0.95) -> float:
    """The t that a Student variable stays within, in size, with this probability; by bisection of `student_share`.

    Args:
        degrees: of freedom, 1 or more.
        share: the probability.
    """
    low, high = 0.0, 1.0
    while student_share(high, degrees) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_share(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def student_share(t: float, degrees: int) -> float:
    """P(|T| < t) of a Student variable, as a finite sum (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4).

    Args:
        t: 0 or more.
        degrees: of freedom, 1 or more.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):  # one term for each two degrees
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
