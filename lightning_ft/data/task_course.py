"""Where a stream is: tasks as stretches of epochs, told from the one counter that a resumed run is sure to have.

Lightning counts epochs in two ways that differ after a stop in mid-epoch, but the number of micro-batches begun since the
first fit began is one number, saved in every checkpoint. Since a stream is a fixed sequence of micro-batches, it tells
which epoch of which task the next one belongs to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from lightning_ft.data.task_parts import TaskPart
from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Stage:
    """A stretch of training on one task.

    Attributes:
        name: of the task.
        rows: of the task.
        epochs: passes over the rows; with ``steps`` one.
        steps: optimizer steps instead.
        batches: micro-batches an epoch, on each rank.
        classes: numbers of its classes, where they are known.
        seen: of all tasks up to this one.
    """

    name: str
    rows: TaskPart
    epochs: int
    steps: int | None
    batches: int
    classes: tuple[int, ...] | None = None
    seen: tuple[int, ...] | None = None


class Course:
    """The stages of a fit, one after the other."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Args: stages: in order."""
        self.stages = list(stages)
        self.stage_of_epoch = [number for number, stage in enumerate(self.stages) for _ in range(stage.epochs)]
        self.sizes = [self.stages[number].batches for number in self.stage_of_epoch]
        self.begins = [0, *accumulate(self.sizes)]  # micro-batches before each epoch, and in all

    @property
    def epochs(self) -> int:
        """Of the whole course."""
        return len(self.sizes)

    def epoch_at(self, done: int) -> int:
        """The epoch that micro-batch number ``done`` (from 0) belongs to; the number of epochs when all are done."""
        return bisect_right(self.begins, done) - 1 if done < self.begins[-1] else self.epochs

    def first_epoch(self, stage: int) -> int:
        """Of a stage."""
        return self.stage_of_epoch.index(stage)

    def end_of(self, stage: int) -> int:
        """Micro-batches done when a stage ends."""
        return self.begins[self.first_epoch(stage) + self.stages[stage].epochs]

    def steps(self, window: int) -> list[int]:
        """Optimizer steps of each stage with so many micro-batches a step; an epoch's last window may be shorter."""
        return [stage.epochs * -(-stage.batches // window) for stage in self.stages]


def begun(trainer: pl.Trainer) -> int:
    """Micro-batches begun since the first fit, over all resumes."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def next_epoch(course: Course, trainer: pl.Trainer) -> int:
    """The epoch that Lightning trains next, or passes through; the number of epochs when all are done.

    A run that resumes from a file of an epoch's end passes through that epoch once more, without a batch, so as to finish
    it; except where the file was saved right after its last batch, see `settle`.
    """
    loop, done = trainer.fit_loop.epoch_loop, begun(trainer)
    epoch = course.epoch_at(done)
    at_edge = done > 0 and done == course.begins[epoch]
    if at_edge and loop.restarting and loop.batch_progress.current.ready > 0:
        return epoch - 1
    return epoch


def settle(course: Course, trainer: pl.Trainer) -> None:
    """Lets a resumed epoch begin at its first batch where the file was saved after the last batch of the one before.

    Lightning does so itself, but asks whether the epoch was complete by the length of the one that follows.
    """
    loop, done = trainer.fit_loop.epoch_loop, begun(trainer)
    if not (loop.restarting and loop.restarted_on_train_batch_end and done and done in course.begins):
        return
    loop.batch_progress.increment_completed()
    loop.batch_progress.reset_on_run()
    loop.scheduler_progress.reset_on_run()
    loop.automatic_optimization.optim_progress.reset_on_run()
    loop.val_loop.batch_progress.total.reset()
    loop.reset_restart_stage()


def epochs_to_count(course: Course, trainer: pl.Trainer, most: int | None) -> int:
    """What Trainer's ``max_epochs`` has to be, in its own count, which is ahead by one for each stop in mid-epoch.

    Args:
        course: of the run.
        trainer: of the run.
        most: epochs that the user allows; None or a negative number: all.
    """
    whole = course.epochs if most is None or most < 0 else min(most, course.epochs)
    counted: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    ahead = counted - next_epoch(course, trainer)
    return whole + ahead


def refuse_unbegun(course: Course, trainer: pl.Trainer, most: int | None) -> None:
    """Refuses a ``max_epochs`` that ends a stream before its last task has begun.

    A quick try stays possible where it says so: ``fast_dev_run``, or a ``max_steps`` that ends the run even earlier.

    Args:
        course: of the run.
        trainer: of the run.
        most: epochs that the user allows; None or a negative number: all.

    Raises:
        Refusal: with the fix.
    """
    needed = course.first_epoch(len(course.stages) - 1)
    if most is None or most < 0 or most > needed or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if 0 <= trainer.max_steps <= sum(-(-size // trainer.accumulate_grad_batches) for size in course.sizes[:most]):
        return
    raise Refusal(
        f"trainer.max_epochs {most} ends the stream before its task {course.stages[-1].name} begins: an epoch of the Trainer is "
        f"an epoch of one task, and the stream has {course.epochs} in all. Set trainer.max_epochs to -1 (TaskStream.epochs says "
        "how long each task is trained); for a quick try set trainer.max_steps, or fast_dev_run."
    )


def refuse_second_fit(trainer: pl.Trainer) -> None:
    """Refuses a Trainer that has trained: its counters go on, and the stream, which lives by them, would be partly over.

    Raises:
        Refusal: with the fix.
    """
    if trainer.ckpt_path is None and begun(trainer):
        raise Refusal(
            f"This Trainer has trained before ({begun(trainer)} micro-batches), and a TaskStream tells by its counters where it "
            "is; make a new Trainer for this fit, with the same callbacks if what they hold is to go on."
        )


def refuse_early_stopping(trainer: pl.Trainer) -> None:
    """Refuses what would end a stream in the middle of a task, without its end, and all tasks after it.

    Raises:
        Refusal: with the fix.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stops = next((c for c in callbacks if isinstance(c, EarlyStopping)), None)
    if stops is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise Refusal(
            f"{type(stops).__name__} stops the whole stream where {stops.monitor} no longer gets better, and the tasks that are "
            "left are never trained; leave it out, and say how long each task is trained by TaskStream.epochs or TaskStream.steps."
        )


def limited(batches: int, trainer: pl.Trainer) -> int:
    """Micro-batches of an epoch within Trainer's ``limit_train_batches``."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


__all__ = [
    "Course",
    "Stage",
    "begun",
    "epochs_to_count",
    "limited",
    "next_epoch",
    "refuse_early_stopping",
    "refuse_second_fit",
    "refuse_unbegun",
    "settle",
]
