"""Which rows meet in which micro-batch: pure functions of (seed, epoch, lengths, world size, accumulation).

A *window* is what one optimizer step sees: ``accumulate`` micro-batches on each of ``world_size`` ranks. With a fixed
``batch_size`` the order of an epoch depends on (seed, epoch) alone and a window is a run of
``G = batch_size * accumulate * world_size`` rows of that order, so that 8 rows in one batch, 4 x 2 accumulated and
2 ranks x 4 are the same rows in every step. Since nothing here is stateful, a run resumed at micro-batch ``i`` sees
what an unbroken one would have seen, and every rank knows the counts of all ranks without asking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lightning_ft.functional.errors import Refusal

_ORDER, _BINS, _BIN_ORDER, _SPLIT = 1, 2, 3, 4  # keeps random streams apart; mixture.py and stream.py go on


@dataclass(frozen=True)
class Plan:
    """One epoch, dealt.

    Attributes:
        micro: ``micro[i][rank]`` are the row numbers of micro-batch ``i`` on that rank, int64; empty means a filler.
        accumulate: micro-batches a window; windows start at multiples of it, the last one may be shorter.
        totals: unit -> (number of micro-batches,) float64, summed over ranks.
    """

    micro: list[list[np.ndarray]]
    accumulate: int
    totals: dict[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.micro)

    def window(self, i: int) -> dict[str, float]:
        """Unit -> total over all ranks and micro-batches of the accumulation window that holds micro-batch ``i``."""
        begin = i - i % self.accumulate
        end = min(begin + self.accumulate, len(self.micro))
        return {unit: float(values[begin:end].sum()) for unit, values in self.totals.items()}


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    units: Mapping[str, np.ndarray] | None = None,
    world_size: int = 1,
    accumulate: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    bucket: bool = False,
    limit: int | None = None,
    rows: np.ndarray | None = None,
) -> Plan:
    """Deals the rows of one epoch to micro-batches and ranks.

    Every row comes exactly once, unless ``rows`` says otherwise, and all ranks get equally many micro-batches. What is
    left for the last window is spread evenly; where there are fewer rows than slots, some ranks get an empty array.

    Args:
        lengths: (rows,) tokens of each row.
        batch_size: rows a micro-batch; exactly one of this and ``max_tokens``.
        max_tokens: instead, best-fit bins of at most so many tokens; one bin is one micro-batch. The bins depend on
            the seed, not on the epoch (so that every epoch has equally many); their order depends on both.
        units: unit -> (rows,) how many of it each row has, such as scored tokens, for the totals. Rows count as one each, and
            tokens not at all, where that is not said.
        world_size: ranks that get different rows.
        accumulate: micro-batches a window.
        seed: of the run.
        epoch: counted from 0.
        shuffle: False keeps the order of the data set (bins: by their first row).
        bucket: sort by length inside each window before dealing, so that rows of like length share a padded batch.
        limit: keep only so many micro-batches; the last window ends there.
        rows: row numbers of this epoch in order, where a mixture draws them (`lightning_ft.data.mixture.Shares`); then
            ``shuffle``, which has been done, is not asked. None: each row once.

    Raises:
        Refusal: if a row is longer than ``max_tokens``.
    """
    if (batch_size is None) == (max_tokens is None):
        raise ValueError("plan_epoch takes exactly one of batch_size and max_tokens")
    lengths = np.asarray(lengths, dtype=np.int64)
    if max_tokens is not None:
        if rows is not None:
            raise ValueError("bins hold each row once; plan_epoch takes rows with batch_size only")
        bins = pack_bins(lengths, max_tokens, seed=seed, shuffle=shuffle)
        micro = _deal_bins(bins, world_size, seed, epoch, shuffle)
    else:
        assert batch_size is not None
        order = epoch_order(len(lengths), seed=seed, epoch=epoch, shuffle=shuffle) if rows is None else rows
        micro = deal_rows(order, batch_size, world_size, accumulate, lengths if bucket else None)
    if limit is not None:
        micro = micro[:limit]
    none = np.zeros(len(lengths), dtype=np.int64)
    totals = count_units(micro, {"token": none, "row": none + 1, **(units or {})})
    return Plan(micro=micro, accumulate=accumulate, totals=totals)


def count_units(micro: list[list[np.ndarray]], units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unit -> (micro-batches,) float64, how many of it each holds on all ranks together.

    Args:
        micro: row numbers of each micro-batch on each rank.
        units: unit -> (rows,) how many of it each row counts for.
    """
    return {
        unit: np.array([sum(int(counts[part].sum()) for part in ranks) for ranks in micro], dtype=np.float64)
        for unit, counts in units.items()
    }


def micro_batches(rows: int, *, batch_size: int, world_size: int) -> int:
    """Micro-batches a rank in one epoch of a plan with a fixed batch size; accumulation does not change it."""
    return math.ceil(rows / (batch_size * world_size))


def epoch_order(rows: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """(rows,) the order of an epoch: a permutation that depends on (seed, epoch) alone."""
    return permutation(rows, (seed, _ORDER, epoch)) if shuffle else np.arange(rows, dtype=np.int64)


def split_rows(
    rows: int, fraction: float, *, seed: int, strata: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers kept for training and held out for validation, each ascending: at least one each where rows allow.

    Args:
        rows: how many there are.
        fraction: share to hold out.
        seed: of the choice.
        strata: (rows,) int64 class of each row: each gives its share, to within one row, and keeps one where rows allow.
    """
    held = min(max(1, round(rows * fraction)), rows - 1) if fraction > 0 else 0
    order = permutation(rows, (seed, _SPLIT))
    if strata is not None and held:
        order = order[_strata_first(strata[order], held)]
    return np.sort(order[held:]), np.sort(order[:held])


def _strata_first(classes: np.ndarray, held: int) -> np.ndarray:
    """An order in which the first ``held`` places have each class as often as its share says, or nearly."""
    _, which, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    exact = sizes * (held / len(classes))
    quota = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    for k in np.argsort(quota - exact, kind="stable").tolist():  # largest remainders first
        quota[k] += int(quota.sum() < held and quota[k] < sizes[k] - 1)
    rank = np.zeros(len(classes), dtype=np.int64)  # of each row among those of its class
    for k in range(len(sizes)):
        rank[which == k] = np.arange(sizes[k])
    return np.argsort(rank >= quota[which], kind="stable")


def pack_bins(lengths: np.ndarray, max_tokens: int, *, seed: int = 0, shuffle: bool = True) -> list[np.ndarray]:
    """Best-fit decreasing: each row, longest first, goes into the fullest bin that still takes it.

    Never more than 11/9 of the least possible number of bins, plus one (Johnson 1973); in practice within one percent.
    Rows of equal length are taken in an order drawn from ``seed``.

    Raises:
        Refusal: if a row is longer than ``max_tokens``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.max()) > max_tokens:
        raise Refusal(
            f"A row has {int(lengths.max())} tokens and cannot go into a bin of max_tokens {max_tokens}: raise "
            "max_tokens, or lower max_length to at most max_tokens."
        )
    tie = permutation(len(lengths), (seed, _BINS)) if shuffle else np.arange(len(lengths))
    order = tie[np.argsort(-lengths[tie], kind="stable")]
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(max_tokens + 1)]  # by tokens still free
    some_open = 0  # bit f is set while open_bins[f] is not empty: the tightest fit is its lowest bit from `length` up
    for row in order.tolist():
        length = int(lengths[row])
        fitting = some_open >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            which = open_bins[free].pop()
            if not open_bins[free]:
                some_open &= ~(1 << free)
        else:
            free, which = max_tokens, len(bins)
            bins.append([])
        bins[which].append(row)
        open_bins[free - length].append(which)
        some_open |= 1 << (free - length)
    arrays = [np.sort(np.array(rows, dtype=np.int64)) for rows in bins]
    return sorted(arrays, key=lambda rows: int(rows[0]))


def _deal_bins(bins: list[np.ndarray], world_size: int, seed: int, epoch: int, shuffle: bool) -> list[list[np.ndarray]]:
    order = permutation(len(bins), (seed, _BIN_ORDER, epoch)) if shuffle else np.arange(len(bins))
    dealt = [bins[i] for i in order]
    empty = np.empty(0, dtype=np.int64)
    dealt += [empty] * (-len(dealt) % world_size)
    return [dealt[i : i + world_size] for i in range(0, len(dealt), world_size)]


def deal_rows(
    order: np.ndarray, batch_size: int, world_size: int, accumulate: int, lengths: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Deals an order of rows: ``micro[i][rank]`` are the rows of micro-batch ``i`` on that rank.

    Args:
        order: (rows,) row numbers.
        batch_size: rows a micro-batch, at most.
        world_size: ranks.
        accumulate: micro-batches a window.
        lengths: by row number: sort by it inside each window; None keeps the order.
    """
    micro: list[list[np.ndarray]] = []
    per_window = batch_size * accumulate * world_size
    for begin in range(0, len(order), per_window):
        window = order[begin : begin + per_window]
        if lengths is not None:
            window = window[np.argsort(lengths[window], kind="stable")]
        steps = micro_batches(len(window), batch_size=batch_size, world_size=world_size)
        # Neighbouring pieces go to the ranks of one micro-batch, so that bucketed ranks do not wait for one another.
        pieces = np.array_split(window, steps * world_size)
        micro += [pieces[i : i + world_size] for i in range(0, len(pieces), world_size)]
    return micro


def permutation(n: int, key: tuple[int, ...]) -> np.ndarray:
    """(n,) a permutation that depends on the key alone.

    By sorting raw bits: NumPy promises the bit stream of PCG64 for ever, but not its ``permutation``.
    """
    bits = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)
