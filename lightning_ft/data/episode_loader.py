"""The loader that deals episodes: which come in which micro-batch on which rank, and where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lightning_ft.data.loader import EpochClock, Placement
from lightning_ft.data.plan import Plan, micro_batches, plan_epoch
from lightning_ft.engine.episodes import Episode, MetaBatch

Make = Callable[[int, np.ndarray], "tuple[Episode, ...] | Episode"]
"""(epoch, numbers of episodes) -> these episodes; of none an empty tuple."""


class EpisodeLoader:
    """Iterable over `MetaBatch`, one epoch each time; episodes follow from (epoch, number) alone.

    Args:
        make: makes episodes.
        episodes: of an epoch, over all ranks.
        batch_size: of a micro-batch.
        placement: called whenever an epoch begins.
        clock: the epochs of the run; None for validation and test, whose episodes are always those of epoch 0.
    """

    def __init__(
        self,
        make: Make,
        *,
        episodes: int,
        batch_size: int,
        placement: Callable[[], Placement] = Placement,
        clock: EpochClock | None = None,
    ) -> None:
        self.make = make
        self.episodes = episodes
        self.batch_size = batch_size
        self.placement = placement
        self.clock = clock or EpochClock()
        if clock is not None:
            self.sampler = self  # Lightning calls set_epoch on `loader.sampler` only

    def set_epoch(self, epoch: int) -> None:
        """Chooses the episodes of the next pass."""
        self.clock.counted = epoch

    def plan(self, placement: Placement) -> Plan:
        """Numbers of the episodes of each micro-batch and rank."""
        ones = np.ones(self.episodes, dtype=np.int64)
        return plan_epoch(
            ones,
            batch_size=self.batch_size,
            units={"task": ones},
            world_size=placement.world_size,
            accumulate=placement.accumulate,
            shuffle=False,
            limit=placement.limit,
        )

    def __len__(self) -> int:
        """Micro-batches an epoch on each rank, without the trainer's limit."""
        return micro_batches(self.episodes, batch_size=self.batch_size, world_size=self.placement().world_size)

    def __iter__(self) -> Iterator[MetaBatch]:
        """Micro-batches of this rank from the position on."""
        placement = self.placement()
        self.clock.begin(placement.position)
        plan, epoch = self.plan(placement), self.clock.epoch
        for i in range(placement.position, len(plan)):
            numbers: np.ndarray = plan.micro[i][placement.rank]
            given = self.make(epoch, numbers) if len(numbers) else ()
            yield MetaBatch(given, {"task": float(len(numbers))}, {"task": plan.window(i)["task"]})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is Lightning's own counter. That it exists tells Lightning that we can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see ``state_dict``."""


__all__ = ["EpisodeLoader"]
