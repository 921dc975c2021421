"""The loader that deals planned micro-batches, and knows the counts of the whole accumulation window.

It is no ``torch.utils.data.DataLoader``: Lightning re-instantiates those, puts its own distributed sampler in (which
repeats rows) and cannot restart them in mid-epoch. This one asks the trainer for the world size, the accumulation and
the position at the moment when an epoch begins, and everything else follows from the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lightning_ft.data.collate import Segment, collate
from lightning_ft.data.plan import Plan, micro_batches, pack_bins, plan_epoch
from lightning_ft.engine.batch import Batch


class Collate(Protocol):
    """Segments -> a micro-batch, see :func:`~lightning_ft.data.collate.collate`."""

    def __call__(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """One micro-batch; no segments give a filler batch."""


class Rows(Protocol):
    """What a loader asks of a data set, such as `TokenRows`."""

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens."""

    @property
    def widths(self) -> np.ndarray:
        """(rows,) tokens of the longest sequence of each row."""

    @property
    def units(self) -> dict[str, np.ndarray]:
        """Unit -> (rows,) how many of it each row counts for."""

    @property
    def copies(self) -> int:
        """Sequences a row."""

    def __len__(self) -> int:
        """Rows."""

    def segments(self, numbers: Sequence[int] | np.ndarray) -> Sequence[Segment]:
        """The rows at these places."""


class EpochRows(Protocol):
    """Which rows an epoch takes, such as `Shares`."""

    def __len__(self) -> int:
        """How many."""

    def rows(self, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """(len(self),) row numbers in order."""


@dataclass(frozen=True)
class Placement:
    """Where a loader runs.

    Attributes:
        world_size: data-parallel ranks.
        rank: this one.
        accumulate: micro-batches a window.
        limit: micro-batches an epoch; None: all.
        position: micro-batches of this epoch that were done before, by a run that this one resumes.
    """

    world_size: int = 1
    rank: int = 0
    accumulate: int = 1
    limit: int | None = None
    position: int = 0


@dataclass
class EpochClock:
    """Which epoch is dealt while Lightning counts another.

    A run that ``max_steps`` ends in the middle of an epoch has counted that epoch as done; resumed with more steps it goes
    on in the middle, and everything after is one epoch behind Lightning's count.

    Attributes:
        counted: Lightning's number of the epoch that begins, or goes on.
        behind: how far the epochs dealt are behind that.
        resumed: the epoch that the resumed checkpoint was written in; None once it is known how far that is behind.
    """

    counted: int = 0
    behind: int = 0
    resumed: int | None = None

    @property
    def epoch(self) -> int:
        """The epoch that is dealt."""
        return self.counted - self.behind if self.resumed is None else self.resumed

    def begin(self, position: int) -> None:
        """Called when batches are asked for.

        Args:
            position: micro-batches of the epoch that were done before.
                Lightning either passes through an epoch that was complete once again, at its end, or begins the next.
        """
        if self.resumed is not None:
            self.behind, self.resumed = self.counted - self.resumed - (position == 0), None


class PlannedLoader:
    """Iterable over :class:`~lightning_ft.engine.batch.Batch`, one epoch each time.

    Args:
        dataset: the rows.
        batch_size: rows a micro-batch, where ``max_tokens`` is None.
        max_tokens: most tokens a micro-batch, filled by best fit.
        packed: rows end to end, or padded and bucketed by length.
        shuffle: a new order each epoch.
        seed: of the run.
        placement: called whenever an epoch begins, so that a schedule of the accumulation is met.
        task: name given to all batches.
        collate: makes a batch of segments.
        shares: which rows an epoch takes; None: each once. Needs ``max_tokens`` None.
        clock: the epochs of the run; None counts them from 0 as Lightning does.
    """

    def __init__(
        self,
        dataset: Rows,
        *,
        batch_size: int,
        max_tokens: int | None = None,
        packed: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        placement: Callable[[], Placement] = Placement,
        task: str | None = None,
        collate: Collate = collate,
        shares: EpochRows | None = None,
        clock: EpochClock | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.packed = packed
        self.shuffle = shuffle
        self.seed = seed
        self.placement = placement
        self.task = task
        self.collate = collate
        self.shares = shares
        self.clock = clock or EpochClock()
        self._bins: int | None = None
        if shuffle or shares is not None:
            # Lightning calls set_epoch on `loader.sampler` only; one that never shuffles has none, and passes for
            # sequential where Lightning asks (overfit_batches).
            self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.clock.counted = epoch

    @property
    def epoch(self) -> int:
        """The epoch that is dealt."""
        return self.clock.epoch

    def plan(self, placement: Placement | None = None) -> Plan:
        """The plan of the current epoch."""
        placement = placement or self.placement()
        return plan_epoch(
            self.dataset.lengths if self.packed else self.dataset.widths,
            batch_size=self.batch_size if self.max_tokens is None else None,
            max_tokens=self.max_tokens,
            units=self.dataset.units,
            world_size=placement.world_size,
            accumulate=placement.accumulate,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            bucket=not self.packed,
            limit=placement.limit,
            rows=self._drawn(),
        )

    def efficiency(self) -> float:
        """Share of the positions computed in an epoch that hold real tokens (for bins: of their capacity)."""
        pieces = [rows for ranks in self.plan(Placement()).micro for rows in ranks]
        lengths, widths = self.dataset.lengths, self.dataset.widths
        tokens = sum(int(lengths[rows].sum()) for rows in pieces)
        if self.max_tokens is not None:
            capacity = len(pieces) * self.max_tokens
        elif self.packed:
            capacity = tokens
        else:
            capacity = sum(self.dataset.copies * len(rows) * int(widths[rows].max()) for rows in pieces)
        return tokens / capacity

    def __len__(self) -> int:
        """Micro-batches an epoch on each rank, without the trainer's limit."""
        world_size = self.placement().world_size
        if self.max_tokens is None:
            rows = len(self.shares) if self.shares is not None else len(self.dataset)
            return micro_batches(rows, batch_size=self.batch_size, world_size=world_size)
        if self._bins is None:
            self._bins = len(pack_bins(self.dataset.lengths, self.max_tokens, seed=self.seed, shuffle=self.shuffle))
        return -(-self._bins // world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches of this rank from the position on; nothing is decided before the first is asked for."""
        placement = self.placement()
        self.clock.begin(placement.position)
        plan = self.plan(placement)
        for i in range(placement.position, len(plan)):
            rows: np.ndarray = plan.micro[i][placement.rank]
            segments = self.dataset.segments(rows)
            yield self.collate(segments, packed=self.packed, window=plan.window(i), task=self.task)

    def _drawn(self) -> np.ndarray | None:
        if self.shares is None:
            return None
        return self.shares.rows(seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is Lightning's own counter. That it exists tells Lightning that we can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see ``state_dict``."""
