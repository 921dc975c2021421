"""How much better a model of several tasks is than one model for each."""

from __future__ import annotations

import math
from collections.abc import Mapping


def relative_improvement(
    measures: Mapping[str, float], baselines: Mapping[str, float], lower: frozenset[str] = frozenset()
) -> float:
    """``mean_k s_k (M_k - B_k) / |B_k|``, s_k = -1 where smaller is better (Maninis et al., 2019, equation 4).

    Not a number where a baseline is 0, or where nothing was measured.

    Args:
        measures: task -> M of the model of several tasks.
        baselines: task -> B of the model trained on that task alone.
        lower: tasks whose measure is better when it is smaller.
    """
    parts = [
        (-1.0 if k in lower else 1.0) * (value - baselines[k]) / abs(baselines[k]) if baselines[k] else math.nan
        for k, value in measures.items()
    ]
    return sum(parts) / len(parts) if parts else math.nan


__all__ = ["relative_improvement"]
