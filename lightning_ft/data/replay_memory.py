"""A replay buffer in a run: what windows offer to it, and what they draw from it, the same however rows are dealt.

A window's rows are offered when it is complete, in the order of its micro-batches and ranks, which every rank is told of; so all
ranks hold one and the same buffer, and eight rows are four rows twice, or two ranks of four. What a window replays is drawn when
it begins, by its step's number, and divided among its micro-batches and ranks. Rows may also wait for the end of their task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device

from lightning_ft.data.batch_rows import Row, batch_of, rows_of
from lightning_ft.data.replay_buffer import ReplayBuffer, class_of, placed
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.randomness import global_seed
from lightning_ft.engine.tasks import task_of
from lightning_ft.functional.errors import Refusal

Balance = Literal["none", "class", "task"]


class ReplayMemory:
    """A buffer and the present window.

    Attributes:
        buffer: the rows.
        reference: the name of what its pairs were compared with; None where they were not.
    """

    def __init__(self, size: int, balance: Balance, name: str, *, waits: bool = False) -> None:
        """Makes an empty one.

        Args:
            size: most rows.
            balance: of which groups each has its share.
            name: of the technique, for messages.
            waits: whether rows come into the buffer when `end_task` is called, not as they are offered. Until then they are in
                a second one, of the same size.
        """
        self.balance, self.name, self.size = balance, name, size
        self.buffer = ReplayBuffer(size, global_seed())
        self._offered = ReplayBuffer(size, global_seed()) if waits else self.buffer
        self.reference: str | None = None
        self._pending: list[list[Row]] = []
        self._drawn: dict[int, tuple[int, list[Row]]] = {}
        self._first_epoch = 0  # of this fit, in the Trainer's count, which goes on where it trains twice

    def begin(self, trainer: pl.Trainer) -> None:
        """Where training begins; a run that resumes has what the fit began with from its checkpoint."""
        if trainer.ckpt_path is None:
            self._first_epoch, self._pending, self._drawn = trainer.current_epoch, [], {}

    # -- what is offered -------------------------------------------------------------------------------------------------

    def note(self, trainer: pl.Trainer, batch: Any) -> None:
        """A micro-batch that was trained; in the first pass over its rows, they are offered when the window is complete."""
        if _micro(trainer) == 0:
            self._pending = []
        self._pending.append(rows_of(batch) if self._in_first_pass(trainer) else [])

    def _in_first_pass(self, trainer: pl.Trainer) -> bool:
        first = getattr(getattr(trainer, "datamodule", None), "in_first_pass", None)
        return bool(first()) if callable(first) else trainer.current_epoch == self._first_epoch

    def close(self, trainer: pl.Trainer, *, complete: Callable[[list[Row]], None] | None = None) -> None:
        """At a window's end: offers its rows.

        Args:
            trainer: of the run.
            complete: adds to the rows that were kept what has to be known of them, in place.
        """
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        window: list[list[list[Row]]] = [self._pending]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, self._pending)
            window = gathered
        self._pending = []
        kept = []
        for micro in zip(*window, strict=True):
            for row in (row for rank in micro for row in rank):
                if self._offered.add(row, self._group(trainer, row)):
                    kept.append(row)
        if complete is not None and kept and self._offered is self.buffer:
            still = {id(row) for rows in self.buffer.groups.values() for row in rows}
            complete([row for row in kept if id(row) in still])

    def end_task(self, *, complete: Callable[[list[Row]], None] | None = None) -> None:
        """Rows that wait come into the buffer.

        Args:
            complete: as of `close`; called with rows that came in before, too.
        """
        if self._offered is self.buffer:
            return
        self.buffer.load(self._offered.state())
        if complete is not None:
            complete([row for rows in self.buffer.groups.values() for row in rows])

    def rows(self) -> list[Row]:
        """All that are held, each once: in the buffer, waiting, or of a window that is not complete."""
        buffers = [rows for buffer in (self.buffer, self._offered) for rows in buffer.groups.values()]
        return list({id(row): row for rows in [*buffers, *self._pending] for row in rows}.values())

    def _group(self, trainer: pl.Trainer, row: Row) -> str:
        if self.balance == "none":
            return ""
        if self.balance == "class":
            try:
                return class_of(row)
            except ValueError:
                raise Refusal(
                    f"{self.name}.balance class needs rows with one class each; balance by task, or not at all."
                ) from None
        task = task_of(trainer)
        return task.name if task is not None else ""

    # -- what is replayed ---------------------------------------------------------------------------------------------------

    def draw(
        self, trainer: pl.Trainer, batch: Any, rows: int | None, which: int = 0, without: str | None = None
    ) -> list[Row]:
        """What the present window replays, on all ranks and in all its micro-batches; nothing from an empty buffer.

        Args:
            trainer: of the run.
            batch: the present micro-batch.
            rows: how many; None: as many as the window trains.
            which: of several draws.
            without: a group that is left out.
        """
        step = trainer.global_step
        if which not in self._drawn or self._drawn[which][0] != step:
            count = rows if rows is not None else _rows_of_window(trainer, batch)
            self._drawn[which] = (step, self.buffer.draw(count, 2 * step + which, without))
        return self._drawn[which][1]

    def share(self, trainer: pl.Trainer, drawn: list[Row]) -> tuple[list[Row], float]:
        """This rank's rows of the present micro-batch, and the factor of a mean over them.

        With it the means of all micro-batches and ranks average to the one over all that was drawn. Where this rank has no rows
        it gets one, and the factor is 0.
        """
        loop = trainer.fit_loop.epoch_loop
        micro, accumulate = _micro(trainer), trainer.accumulate_grad_batches
        left = trainer.num_training_batches - (loop.batch_progress.current.ready - 1 - micro)
        of, world = int(min(accumulate, left)), trainer.world_size
        mine = placed(drawn, micro, of, trainer.global_rank, world)
        return (mine, len(mine) * of * world / len(drawn)) if mine else (drawn[:1], 0.0)

    # -- what a checkpoint holds -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The buffer, what waits, and what the present window has to offer."""
        waiting = {} if self._offered is self.buffer else {"offered": self._offered.state()}
        return {
            "buffer": self.buffer.state(),
            **waiting,
            "seed": self.buffer.seed,
            "reference": self.reference,
            "first_epoch": self._first_epoch,
            "pending": [list(rows) for rows in self._pending],
        }

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave; also that of one whose rows waited, or did not."""
        offered, waits = state.get("offered", state["buffer"]), self._offered is not self.buffer
        self.buffer = self._offered = ReplayBuffer(self.size, int(state["seed"]))
        self.buffer.load(state["buffer"] if waits else offered)
        if waits:
            self._offered = ReplayBuffer(self.size, int(state["seed"]))
            self._offered.load(offered)
        self.reference, self._first_epoch = state.get("reference"), int(state.get("first_epoch", 0))
        self._pending = [list(rows) for rows in state["pending"]]
        self._drawn = {}


def totals_of(rows: list[Row]) -> dict[str, float]:
    """Units -> how many the rows have, as batches of them count."""
    if not rows or "segments" not in rows[0]:
        return {}
    counts: dict[str, float] = {}
    for row in rows:
        for unit, count in batch_of([row]).counts.items():
            counts[unit] = counts.get(unit, 0.0) + count
    return counts


def on_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch of rows that were kept as a step saw them, where the module is, and as the task that is trained now wants it."""
    remask = getattr(getattr(trainer, "datamodule", None), "remask", None)
    if callable(remask):
        remask(batch)
    return move_data_to_device(batch, trainer.strategy.root_device)  # by no hook of the data's: they have been called


def _micro(trainer: pl.Trainer) -> int:
    """Which micro-batch of its window is trained, from 0."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches


def _rows_of_window(trainer: pl.Trainer, batch: Any) -> int:
    if isinstance(batch, Batch) and batch.window is not None:
        return int(batch.window.get("pair", batch.window.get("row", 0.0)))
    return len(rows_of(batch)) * trainer.accumulate_grad_batches * trainer.world_size


__all__ = ["Balance", "ReplayMemory", "on_device", "totals_of"]
