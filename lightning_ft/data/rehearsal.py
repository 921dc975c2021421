"""What techniques share that keep rows of earlier steps and train on them again: a memory, and its place in a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_ft.data.batch_rows import Row, batch_of, rows_of
from lightning_ft.data.replay_memory import Balance, ReplayMemory, on_device, totals_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.technique import Technique

AT_ONCE = 64
"""Rows that are asked at once, when what has to be known of them is added."""
_REFERENCE = "reference_logps"


class Rehearsal(Technique):
    """Keeps rows of what is trained; subclasses say what they do with them.

    Subclasses store ``size`` and ``balance``, have `lightning_ft.engine.traits.ROWS_ALONE` among their traits, and store the
    attachment when they register.
    """

    size: int
    balance: Balance

    def __init__(self) -> None:
        self._memory: ReplayMemory | None = None
        self._attachment: Attachment | None = None
        self._stored: dict[str, Any] = {}

    @property
    def _waits(self) -> bool:
        """Whether rows wait for the end of their task before they come into memory."""
        return False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An empty memory, or that of the checkpoint, or of the fit before."""
        super().on_train_start(trainer, pl_module)
        if self._attachment is None:
            return
        if self._memory is None:
            self._memory = ReplayMemory(self.size, self.balance, type(self).__name__, waits=self._waits)
        if self._stored:
            self._memory.load(self._stored)
            self._stored = {}
        self._memory.begin(trainer)
        self._renew_reference(trainer, pl_module, self._memory)
        # Of rows that came with the memory of a technique that was set otherwise; all others are complete.
        self._complete(trainer, pl_module, [row for rows in self._memory.buffer.groups.values() for row in rows])

    def _renew_reference(self, trainer: pl.Trainer, module: pl.LightningModule, memory: ReplayMemory) -> None:
        """A new fit has a new start, by which pairs of the fit before are scored anew; the bare base is the same in all."""
        before, memory.reference = memory.reference, getattr(module, "known_reference", None)
        if trainer.ckpt_path is not None or before == memory.reference == "base":
            return
        rows = [row for row in memory.rows() if row.get("columns", {}).pop(_REFERENCE, None) is not None]
        for begin in range(0, len(rows) if memory.reference is not None else 0, AT_ONCE):
            piece = rows[begin : begin + AT_ONCE]
            batch = on_device(trainer, batch_of(piece))
            module.renew_reference(batch)  # type: ignore[operator]
            for row, told in zip(piece, rows_of(batch), strict=True):
                row["columns"][_REFERENCE] = told["columns"][_REFERENCE]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Pairs learn their reference's log-probabilities before they are kept, so that it is asked once."""
        known = getattr(pl_module, "know_reference", None)
        if self._memory is not None and callable(known):
            known(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Offers the rows of a complete window to the memory."""
        if self._memory is None or self._attachment is None:
            return
        self._memory.note(trainer, batch)
        self._memory.close(trainer, complete=lambda rows: self._complete(trainer, pl_module, rows))

    def _end_task(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lets rows come into memory that waited for it."""
        if self._memory is not None and self._attachment is not None:
            self._memory.end_task(complete=lambda rows: self._complete(trainer, module, rows))

    def _complete(self, trainer: pl.Trainer, module: pl.LightningModule, rows: list[Row]) -> None:
        """Adds to rows that were just kept what has to be known of them, in place; the rows alone are enough here."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The memory stays for a next fit."""
        super().teardown(trainer, pl_module, stage)
        self._attachment = None

    def _again(self, trainer: pl.Trainer, batch: Any, rows: list[Row], drawn: list[Row]) -> Any:
        """A micro-batch of some of the rows that were drawn, laid out as the one that is trained, and counted as all of them."""
        made = batch_of(rows, packed=isinstance(batch, Batch) and batch.bounds is not None)
        if isinstance(made, Batch):
            made = replace(made, window=totals_of(drawn))
        return on_device(trainer, made)

    def state_dict(self) -> dict[str, Any]:
        """The memory, in plain tensors and numbers."""
        return self._memory.state() if self._memory is not None else dict(self._stored)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken when training starts."""
        self._stored = dict(state_dict)


__all__ = ["AT_ONCE", "Rehearsal"]
