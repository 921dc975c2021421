"""A user's plain DataLoader, whose rows are chosen by plan: each once an epoch, the ranks' apart, from a position on.

One exception, on several ranks: where a micro-batch has fewer rows than there are ranks, a rank without any repeats those of the
first, since a user's own step cannot count none. Scores and gradients count the rows of that one micro-batch twice; the data
modules of this library have fillers instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from lightning_ft.data.loader import Placement
from lightning_ft.data.plan import deal_rows, epoch_order, micro_batches
from lightning_ft.engine.randomness import global_seed


class DealtLoader:
    """Batches of a plain DataLoader's rows, chosen by plan."""

    def __init__(
        self,
        source: DataLoader[Any],
        rows: np.ndarray,
        placement: Callable[[], Placement],
        *,
        epoch: Callable[[], int] = lambda: 0,
        shuffle: bool = False,
        steps: int | None = None,
    ) -> None:
        """Args: as `lightning_ft.data.task_parts.PlainTask` gives them."""
        self.source, self.rows, self.placement = source, rows, placement
        self.epoch, self.shuffle, self.steps = epoch, shuffle, steps

    def _order(self) -> np.ndarray:
        """(rows,) of this epoch: each once, or pass after pass until the steps are full."""
        if self.steps is None:
            return self.rows[epoch_order(len(self.rows), seed=global_seed(), epoch=self.epoch(), shuffle=self.shuffle)]
        needed = self._step_rows()
        passes = -(-needed // len(self.rows))
        first = self.epoch() * passes
        orders = [
            epoch_order(len(self.rows), seed=global_seed(), epoch=first + n, shuffle=self.shuffle)
            for n in range(passes)
        ]
        return self.rows[np.concatenate(orders)[:needed]]

    def _step_rows(self) -> int:
        placement = self.placement()
        assert self.steps is not None and self.source.batch_size is not None
        return self.steps * self.source.batch_size * placement.accumulate * placement.world_size

    def __len__(self) -> int:
        """Micro-batches an epoch on each rank."""
        assert self.source.batch_size is not None
        rows = len(self.rows) if self.steps is None else self._step_rows()
        return micro_batches(rows, batch_size=self.source.batch_size, world_size=self.placement().world_size)

    def __iter__(self) -> Iterator[Any]:
        """From the position on."""
        placement, source = self.placement(), self.source
        assert source.batch_size is not None
        micro = deal_rows(self._order(), source.batch_size, placement.world_size, placement.accumulate)
        # A rank without rows repeats another's: a plain step has no way to count none.
        mine = [(ranks[placement.rank] if len(ranks[placement.rank]) else ranks[0]).tolist() for ranks in micro]
        yield from DataLoader(
            source.dataset,
            batch_sampler=_Listed(mine[placement.position :]),
            num_workers=source.num_workers,
            collate_fn=source.collate_fn,
            pin_memory=source.pin_memory,
            worker_init_fn=source.worker_init_fn,
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is Lightning's own counter."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class _Listed(Sampler[list[int]]):
    """Batches as listed."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


__all__ = ["DealtLoader"]
