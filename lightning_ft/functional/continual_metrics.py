"""What is measured of a model that learns one task after another: numbers read off the matrix of its scores.

``R[i][j]`` is the score on task j after training on tasks 0 to i, ``b[j]`` the score on task j before any training. With n
tasks trained (rows 0 to n - 1), and scores of which more is better:

    average              mean_{j < n} R[n-1][j]
    backward_transfer    mean_{j < n-1} (R[n-1][j] - R[j][j])
    forward_transfer     mean_{0 < j < n} (R[j-1][j] - b[j])
    forgetting_max       mean_{j < n-1} (max_{j <= l < n-1} R[l][j] - R[n-1][j])
    forgetting_first     mean_{j < n-1} (R[j][j] - R[n-1][j])

The first three are those of Lopez-Paz and Ranzato (2017, equations 2 to 4); ``forgetting_max`` is that of Chaudhry et al.
(2018, equation 3), whose maximum leaves the last row out, so that it may be negative where a task got better;
``forgetting_first`` is what Avalanche calls forgetting, and the negative of the backward transfer. Of a score of which less is
better, transfer and forgetting are taken with the other sign (and the best is the least), so that more transfer is good and
more forgetting is bad in any case; ``average`` stays as it is. A task of which no score is known at all, having no rows to
validate on, has no part in the means: they are over the other tasks. What a mean has no terms for, or a missing score (None) of
those, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[float | None]


def continual_metrics(
    scores: Sequence[Row], start: Row | None = None, *, higher_is_better: bool = True
) -> dict[str, float]:
    """The five numbers after the last row, by the names above.

    Args:
        scores: (n, K), a row for each task that was trained, in order; column j is the task of row j, and further columns are
            tasks still to come. None where a score was not measured.
        start: (K,) before any training; None where it was not measured.
        higher_is_better: direction of the score.
    """
    done = len(scores)
    if done == 0:
        return {}
    sign = 1.0 if higher_is_better else -1.0
    last = scores[-1]
    known_rows = [*scores, start] if start is not None else list(scores)
    judged = [j for j in range(done) if any(row[j] is not None for row in known_rows)]
    earlier = [j for j in judged if j < done - 1]
    at = [[None if value is None else sign * value for value in row] for row in scores]
    found = {
        "average": [last[j] for j in judged],
        "backward_transfer": [_less(at[-1][j], at[j][j]) for j in earlier],
        "forgetting_max": [_less(_best([at[k][j] for k in range(j, done - 1)]), at[-1][j]) for j in earlier],
        "forgetting_first": [_less(at[j][j], at[-1][j]) for j in earlier],
    }
    if start is not None:
        before = [None if value is None else sign * value for value in start]
        found["forward_transfer"] = [_less(at[j - 1][j], before[j]) for j in judged if j > 0]
    means = {}
    for name, terms in found.items():
        known = [term for term in terms if term is not None]
        if terms and len(known) == len(terms):
            means[name] = sum(known) / len(known)
    return means


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _best(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


__all__ = ["continual_metrics"]
