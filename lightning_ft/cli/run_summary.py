"""``summary.json`` and ``row.json`` of a fit: what `report` and `compare` know of a run besides its curves."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from lightning_ft.cli.run_folder import ROW, SUMMARY
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.summary import trained_counts
from lightning_ft.engine.technique import Technique
from lightning_ft.formats.atomic import write_text
from lightning_ft.functional.memory import peak_memory_bytes

SECONDS = "lightning_ft_train_seconds"


class RunSummary(Callback):
    """Writes what a run is and what came of it into its folder: when it begins, after each validation, and at the end.

    So a run that is still going, or was killed, has one too. Times of a resumed run go on where its checkpoint was written.
    """

    def __init__(self) -> None:
        self._earlier_seconds = 0.0
        self._began: float | None = None
        self._folder = Path()
        self._facts: dict[str, Any] = {}
        self._val_rows: float | None = None

    # What a checkpoint holds: a key of its own, since Lightning warns of a callback's state where the callback is missing.

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Seconds of training so far."""
        checkpoint[SECONDS] = self._seconds()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on counting."""
        self._earlier_seconds = float(checkpoint.get(SECONDS, 0.0))

    # When it writes

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is known before the first step, and the first row as the model sees it."""
        self._began = time.perf_counter()
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir broadcasts: all ranks ask
        if trainer.is_global_zero:
            self._facts = _identity(trainer, pl_module)
            self._write(trainer, pl_module, "training")
            self._write_row(getattr(trainer, "datamodule", None))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the rows anew."""
        self._val_rows = None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Fillers that make ranks equal count zero."""
        if isinstance(batch, Batch):
            self._val_rows = (self._val_rows or 0) + batch.counts.get("row", 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The scores so far."""
        if trainer.sanity_checking or self._began is None:
            return
        if self._val_rows is not None and trainer.world_size > 1:
            mine = torch.tensor(float(self._val_rows), device=pl_module.device)
            self._val_rows = float(trainer.strategy.reduce(mine, reduce_op="sum"))
        self._write(trainer, pl_module, "training")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All but the last checkpoint's name, which is written after this."""
        self._write(trainer, pl_module, "finished")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last checkpoint too; nothing is counted here, where the module may have left its device."""
        self._write(trainer, None, "finished")
        self._earlier_seconds, self._began = 0.0, None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """An interrupted run says so; of one that failed before a step nothing is kept."""
        if trainer.global_step > 0:
            self._write(trainer, None, "stopped")

    # What it writes

    def _seconds(self) -> float:
        return self._earlier_seconds + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule | None, status: str) -> None:
        if not trainer.is_global_zero or not self._facts:
            return
        if module is not None:
            self._measure(trainer, module)
        checkpoint = trainer.checkpoint_callback
        own = checkpoint if isinstance(checkpoint, ModelCheckpoint) else None
        best = own.best_model_path if own is not None and own.monitor is not None else None
        self._facts |= {"status": status, "steps": trainer.global_step, "train_seconds": self._seconds()}
        self._facts["checkpoints"] = {
            "best": self._inside(best),
            "last": self._inside((own.last_model_path or own.best_model_path) if own is not None else None),
        }
        write_json(self._folder / SUMMARY, self._facts)

    def _write_row(self, datamodule: Any) -> None:
        if not (hasattr(datamodule, "preview") and hasattr(datamodule, "reports")):  # as `inspect` needs them
            return
        for row in datamodule.preview(1):
            pieces = [{"text": piece.text, "scored": piece.scored} for piece in row.pieces]
            facts = {"where": row.where, "tokens": row.tokens, "scored": row.scored, "pieces": pieces}
            write_json(self._folder / ROW, facts)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trained, total = trained_counts(module)
        trained = max(trained, self._facts.get("trainable_parameters", 0))  # a technique may thaw and freeze on the way
        scores = {name: _number(value) for name, value in trainer.callback_metrics.items()}
        speed = scores.pop("train/tokens_per_second", None)
        self._facts |= {
            "epochs": _epochs(trainer),
            "tokens_per_second": speed,
            "peak_memory_bytes": peak_memory_bytes(module.device),
            "trainable_parameters": trained,
            "total_parameters": total,
            "trainable_share": trained / max(total, 1),
            "metrics": scores,
            "val_rows": int(self._val_rows) if self._val_rows is not None else None,
        }

    def _inside(self, path: str | None) -> str | None:
        """Relative to the run's folder, which may be renamed; as it is when it lies elsewhere."""
        if not path:
            return None
        folder, file = self._folder.resolve(), Path(path).resolve()
        return str(file.relative_to(folder)) if folder in file.parents else str(path)


def _identity(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What the run is: it does not change while it goes on."""
    rate = getattr(module, "resolved_lr", None)
    device = module.device
    return {
        "status": "training",
        "module": type(module).__name__,
        "task": getattr(module, "task", None),
        "base": getattr(module, "base", None),
        "data": repr(getattr(trainer, "datamodule", None)),
        "techniques": [repr(one) for one in trainer.callbacks if isinstance(one, Technique)],  # type: ignore[attr-defined]
        "learning_rate": rate() if callable(rate) else None,
        "seed": int(os.environ["PL_GLOBAL_SEED"]) if os.environ.get("PL_GLOBAL_SEED") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "versions": {
            "lightning_ft": lightning_ft.__version__,
            **{name: version(name) for name in ("torch", "lightning", "transformers")},
            "python": platform.python_version(),
        },
    }


def _epochs(trainer: pl.Trainer) -> float | None:
    """Passes over the training rows, parts of one too; None where nobody knows how long one is."""
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return done / batches if 0 < batches < math.inf else None


def _number(value: Any) -> float | None:
    """None for what JSON has no number for."""
    number = float(value)
    return number if math.isfinite(number) else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that a reader finds the old content or the new, never half of it."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
