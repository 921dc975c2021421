"""A callback that reads the clock at the end of each optimizer step, on a CPU or with a GPU at rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback

from benchmarks.measure import StepClock


class StepWatch(Callback):
    """Times steps; losses are read from the device when the fit has ended.

    Args:
        warmup: first steps that are trained but not timed.
        before: done once with the module, right before the first step.

    Attributes:
        clock: what was measured.
        batch: the last one that was trained on.
    """

    batch: Any = None

    def __init__(self, warmup: int, before: Callable[[Any], None] | None = None) -> None:
        self.clock = StepClock(warmup)
        self._before = before
        self._losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the first step."""
        self._cuda = pl_module.device.type == "cuda"
        if self._before is not None:
            self._before(pl_module)
        self._rest()
        self.clock.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends a step."""
        self._rest()
        self._losses.append((outputs["loss"] if isinstance(outputs, dict) else outputs).detach())
        self.clock.tokens.append(batch.tokens)
        self.clock.tick()
        self.batch = batch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Reads the losses."""
        self.clock.losses = [float(loss) for loss in self._losses]

    def _rest(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
