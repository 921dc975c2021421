"""How fast a fit is and how much memory it takes, measured while it runs."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from annotated_types import Ge
from lightning.pytorch import Callback

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.summary import trained_counts
from lightning_ft.functional.memory import peak_memory_bytes


class Throughput(Callback):
    """Logs tokens per second, and writes the whole fit's figures to ``throughput.json`` in its folder.

    Tokens are real ones, padding left out, of this rank. Time is that of the training batches alone, from a batch's start to
    its end: validation, checkpoints and loading between batches do not count, nor do the first ``warmup`` batches, in which
    torch prepares its kernels.

    Args:
        warmup: micro-batches left out at the start; 2 covers the first step of the optimizer as well.
    """

    def __init__(self, warmup: Annotated[int, Ge(0)] = 2) -> None:
        self.warmup = warmup
        self._seen = 0
        self._tokens = 0
        self._seconds = 0.0
        self._batch_began = 0.0
        self._fit_began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew for each fit."""
        self._seen = self._tokens = 0
        self._seconds = 0.0
        self._fit_began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._batch_began = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops it; logs once the warm-up is over."""
        self._seen += 1
        if self._seen <= self.warmup or not isinstance(batch, Batch):
            return
        self._seconds += _now(pl_module.device) - self._batch_began
        self._tokens += batch.tokens
        pl_module.log("train/tokens_per_second", self._tokens / self._seconds, prog_bar=True, rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the figures of the fit."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir broadcasts: all ranks ask
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trained, total = trained_counts(pl_module)
        figures = {
            "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
            "train_seconds": time.perf_counter() - self._fit_began,
            "peak_memory_bytes": peak_memory_bytes(pl_module.device),
            "trainable_parameters": trained,
            "parameters": total,
            "optimizer_steps": trainer.global_step,
        }
        file = folder / "throughput.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
