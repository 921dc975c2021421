"""What a fit puts into its run folder: the configuration, the metrics; and whether the disk has room for it."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_ft.cli.errors import rank
from lightning_ft.cli.run_folder import CONFIG, METRICS, check_disk, checkpoint_bytes, free_sibling


class DiskCheck(Callback):
    """Refuses a fit whose checkpoints would not fit on the disk, once it is known what is trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After ``configure_model``: the trained parts exist."""
        trainable = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        check_disk(self.folder, checkpoint_bytes(trainable))


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration of a fit into its folder; of a resumed one too, the earlier kept beside it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: until everything is restored, this run may still be refused."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Only a fit is a run of its own: validating one must not overwrite how it was made."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / CONFIG  # log_dir broadcasts: all ranks ask
        if trainer.is_global_zero and path.is_file():
            path.replace(free_sibling(path))
        super().setup(trainer, pl_module, "fit")


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger, which on resume goes on in the old file instead of deleting it.

    Rows logged after the checkpoint that is resumed are dropped: those steps are about to be done again.
    """

    def __init__(self, folder: Path, *, resumed_step: int | None = None) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=10)
        self._resumed_step = resumed_step

    @property
    def log_dir(self) -> str:
        """The run's folder itself, without a version below it."""
        return os.fspath(self.save_dir)

    @property
    def experiment(self) -> Any:
        """The writer; made on rank 0 when first asked for."""
        if self._experiment is None and rank() == 0 and self._resumed_step is not None:
            kept = _rows_up_to(Path(self.log_dir) / METRICS, self._resumed_step)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Experiment logs directory")
                writer = super().experiment  # deletes the old file, and says so
            if kept:
                writer.metrics_keys = sorted(kept[0])
                with open(writer.metrics_file_path, "w", newline="") as file:
                    table = csv.DictWriter(file, fieldnames=writer.metrics_keys)
                    table.writeheader()
                    table.writerows(kept)
            return writer
        return super().experiment


def _rows_up_to(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of a metrics file that belong to the first ``step`` optimizer steps (Lightning counts them from 0)."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and int(row["step"]) < step]
