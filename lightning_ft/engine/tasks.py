"""What continual learning calls a task, and where techniques and modules learn which one is trained now.

Any callback, and the LightningModule itself, may define the two hooks of `TaskHooks`. The task stream calls them on all
ranks, each exactly once a task, however often the run is killed and resumed:

    on_task_start   before the first batch of the task, when everything is restored
    on_task_end     after its last batch and the validation that follows, before the checkpoint of that epoch is saved

A run that is resumed in the middle of a task calls neither, so what a technique made there has to be in its
``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning.pytorch as pl

from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        index: its number, from 0; a stream that goes on from a checkpoint counts on.
        name: as the user wrote it, or ``task_0``.
        batches: gives the rows that it is trained on, each once, in a fixed order, the share of this rank; every call
            begins anew. Tensors are in main memory, and of ranks with fewer rows the last batch may be a filler.
        classes: numbers of the classes whose rows it holds; None where rows have no class or the stream does not ask.
        seen: the same of all tasks up to this one.
    """

    index: int
    name: str
    batches: Callable[[], Iterable[Any]] = field(repr=False, compare=False)
    classes: tuple[int, ...] | None = None
    seen: tuple[int, ...] | None = None

    @property
    def first(self) -> bool:
        """Whether no task came before it."""
        return self.index == 0


class TaskHooks(Protocol):
    """What a callback or a LightningModule may define, one of them or both; nobody has to inherit from this."""

    def on_task_start(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> None:
        """Before the first batch of the task."""

    def on_task_end(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> None:
        """After its last batch and the validation that follows."""


def task_of(trainer: pl.Trainer) -> Task | None:
    """The task that is trained now; None without a task stream, before it begins, and where its tasks are not told."""
    # Other data have a ``task`` too, the name of what a classifier predicts.
    found = getattr(getattr(trainer, "datamodule", None), "task", None)
    return found if isinstance(found, Task) else None


def baseline_of(trainer: pl.Trainer) -> str | None:
    """``naive`` or ``joint`` where the stream asks continual techniques to sit out, so that they can be compared with that."""
    data = getattr(trainer, "datamodule", None)
    found: str | None = getattr(data, "baseline", None) if hasattr(data, "tells_tasks") else None
    return found


def task_count(trainer: pl.Trainer) -> int:
    """How many tasks will have been trained when the run is over, those of earlier runs counted; without a stream it is one."""
    count = getattr(getattr(trainer, "datamodule", None), "task_count", None)
    return count if isinstance(count, int) else 1


def tasks_learned(trainer: pl.Trainer) -> int:
    """How many tasks earlier runs have trained, which a stream goes on from."""
    return len(getattr(getattr(trainer, "datamodule", None), "learned", ()))


def require_tasks(trainer: pl.Trainer, name: str) -> None:
    """Refuses a run whose data tell no tasks; for techniques that act between two of them.

    Args:
        trainer: of the run.
        name: of the technique.

    Raises:
        Refusal: ``EWC acts when a task ends, and ... has none; ...``
    """
    if trainer.state.fn != "fit":
        return
    data = getattr(trainer, "datamodule", None)
    tells = getattr(data, "tells_tasks", None)
    if tells is None:
        raise Refusal(
            f"{name} acts between tasks, and {type(data).__name__ if data is not None else 'this run'} has none; wrap the data "
            "in a TaskStream (one task is enough: the next command goes on from its checkpoint with continue_from)."
        )
    if not tells:
        raise Refusal(
            f"{name} acts between tasks, and a stream with scenario free does not tell where one ends; choose another scenario, or "
            "a technique that needs no borders (Replay, AGEM)."
        )


__all__ = ["Task", "TaskHooks", "baseline_of", "require_tasks", "task_count", "task_of", "tasks_learned"]
