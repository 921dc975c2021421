"""How often each task comes: probabilities from the tasks' sizes, and the sequence of tasks that they give.

Everything is a function of (seed, epoch, place): nothing is kept between two draws, so a run that goes on in the middle of an
epoch finds the same tasks.

    proportional  p_k ~ min(n_k, cap)                              each row of the joint data counts alike, but for the cap
    temperature   p_k ~ min(n_k, cap)^(1/T)                        T = 1 is proportional, large T uniform (Raffel et al., 2020)
    uniform       p_k = 1 / K
    annealed      p_k ~ n_k^a, a = 1 - 0.8 e / (E - 1)             from proportional to nearly uniform (Stickland and Murray, 2019)
    weighted      p_k ~ weight_k
    round_robin   task 0, 1, ..., K - 1, 0, ...                    nothing is drawn; an epoch goes on where the last ended
    loss_driven   p_k ~ min(n_k, cap)^(1/T) r_k^g                  r_k: the task's loss, relative to that of its first epoch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Method = Literal["proportional", "temperature", "uniform", "annealed", "weighted", "round_robin", "loss_driven"]
_TASK, _ROWS = 31, 32  # random streams of their own, beside those of the data's plans


def probabilities(
    sizes: Sequence[int],
    method: Method = "proportional",
    *,
    temperature: float = 1.0,
    cap: int | None = None,
    weights: Sequence[float] | None = None,
    progress: float = 0.0,
    ratios: Sequence[float] | None = None,
    strength: float = 1.0,
) -> np.ndarray:
    """(K,) probability of each task, with the sum 1.

    Args:
        sizes: (K,) rows of each task, n.
        method: which.
        temperature: T.
        cap: most rows that a task is taken to have; None: no bound.
        weights: (K,) of weighted.
        progress: of annealed: e / (E - 1), from 0 in the first epoch to 1 in the last.
        ratios: (K,) of loss_driven: r; None before they are known.
        strength: of loss_driven: g.
    """
    n = np.asarray(sizes, dtype=np.float64)
    if method == "weighted":
        assert weights is not None, "weighted sampling needs weights"
        share = np.asarray(weights, dtype=np.float64)
    elif method in ("uniform", "round_robin"):
        share = np.ones_like(n)
    elif method == "annealed":
        share = n ** (1.0 - 0.8 * min(max(progress, 0.0), 1.0))
    else:
        share = (np.minimum(n, cap) if cap is not None else n) ** (
            1.0 / temperature if method != "proportional" else 1.0
        )
    if method == "loss_driven" and ratios is not None:
        share = share * np.maximum(np.asarray(ratios, dtype=np.float64), 1e-6) ** strength
    found: np.ndarray = share / share.sum()
    return found


def task_sequence(chances: np.ndarray, count: int, *, seed: int, epoch: int, in_turn: bool = False) -> np.ndarray:
    """(count,) the task of each place of an epoch: drawn independently with replacement, or in turn on from the epoch before.

    By bits of PCG64, which NumPy promises to keep.
    """
    if in_turn:
        return np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64) % len(chances)
    bits = np.random.PCG64(np.random.SeedSequence([seed, _TASK, epoch])).random_raw(count)
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    edges = np.cumsum(chances)[:-1]
    return np.searchsorted(edges, uniform, side="right").astype(np.int64)


def rows_in_tasks(
    tasks: np.ndarray, sizes: Sequence[int], *, seed: int, epoch: int, shuffle: bool = True
) -> np.ndarray:
    """(N,) the row of its task at each place: no row of a task twice before all have come once, within an epoch.

    Args:
        tasks: (N,) from `task_sequence`.
        sizes: (K,) rows of each task.
        seed: of the run.
        epoch: counted from 0; each has orders of its own.
        shuffle: False takes rows in the order of the data.
    """
    rows = np.zeros(len(tasks), dtype=np.int64)
    for k, size in enumerate(sizes):
        places = np.flatnonzero(tasks == k)
        passes = -(-len(places) // size)
        orders = [_order(size, (seed, _ROWS, k, epoch, n)) if shuffle else np.arange(size) for n in range(passes)]
        if passes:
            rows[places] = np.concatenate(orders)[: len(places)]
    return rows


def _order(n: int, key: tuple[int, ...]) -> np.ndarray:
    return np.argsort(np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(n), kind="stable").astype(np.int64)


__all__ = ["Method", "probabilities", "rows_in_tasks", "task_sequence"]
