"""A Trainer that leaves every word to the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


def silent_trainer(folder: str | Path | None = None, callbacks: Sequence[Any] = (), **options: Any) -> pl.Trainer:
    """A `lightning.pytorch.Trainer` without logger, bar, summary and checkpoints.

    Args:
        folder: where it would write, as tuners do.
        callbacks: of the run.
        options: further ones of the Trainer, and those that take back some of this.
    """
    import lightning.pytorch as pl

    off: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**off, **options})


__all__ = ["silent_trainer"]
