"""The stages of one fit of a task stream: which tasks it trains, in which order, and how long each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import lightning.pytorch as pl

from lightning_ft.data.task_arguments import Amount, amounts
from lightning_ft.data.task_course import Stage, limited
from lightning_ft.data.task_cut import joined
from lightning_ft.data.task_parts import PlainTask, PlannedTask
from lightning_ft.functional.errors import Refusal

JOINT = "joint"
"""Name of all tasks at once."""
Running = Callable[[], pl.Trainer | None]


@dataclass(frozen=True)
class Given:
    """What a stream consists of.

    Attributes:
        parts: name of a task -> its rows, in the order of training.
        classes: name -> numbers of the classes that it has; None where rows have none. Also of tasks that earlier runs learned,
            and of all tasks at once where they are trained so.
        epochs: as the user gave them.
        steps: likewise; None where epochs count.
    """

    parts: Mapping[str, PlannedTask | PlainTask]
    classes: Mapping[str, tuple[int, ...] | None]
    epochs: Amount
    steps: Amount | None


def stages_of(given: Given, learned: Sequence[str], running: Running, *, joint: bool) -> list[Stage]:
    """The stages of a fit.

    Args:
        given: what the stream consists of.
        learned: names of tasks that earlier runs have trained, which are left out.
        running: gives the Trainer, whose limits bound the batches of an epoch.
        joint: whether all tasks are one stage.

    Raises:
        Refusal: where nothing is left to learn, or a task has nothing to learn from.
    """
    names = [name for name in given.parts if name not in learned]
    if not names:
        raise Refusal(
            f"TaskStream.continue_from: its run has learned all of {', '.join(given.parts)}; add a task, or only validate."
        )
    epochs = amounts(given.epochs, list(given.parts), "epochs")
    steps = amounts(given.steps, list(given.parts), "steps")
    if joint:
        return [_measured(_joint(given, epochs, steps, running), running)]
    stages, seen = [], {number for name in learned for number in given.classes.get(name) or ()}
    for name in names:
        classes = given.classes[name]
        seen |= set(classes or ())
        known = tuple(sorted(seen)) if classes else None
        stage = Stage(name, given.parts[name], epochs[name] or 1, steps[name], 0, classes, known)
        stages.append(_measured(stage, running))
    return stages


def _joint(given: Given, epochs: dict[str, int | None], steps: dict[str, int | None], running: Running) -> Stage:
    """All tasks at once, for as many passes as their rows would have had, or as many steps."""
    sizes = {name: part.deal()["rows"] for name, part in given.parts.items()}
    passes = max(1, round(sum(sizes[n] * (epochs[n] or 1) for n in sizes) / sum(sizes.values())))
    total = sum(step for step in steps.values() if step is not None) if given.steps is not None else None
    classes, rows = given.classes[JOINT], joined(list(given.parts.values()), running)
    return Stage(JOINT, rows, 1 if total else passes, total, 0, classes, classes)


def _measured(stage: Stage, running: Running) -> Stage:
    """With the number of its batches.

    Raises:
        Refusal: none, which would leave the stream without a place in it.
    """
    if not stage.rows.deal()["rows"]:
        raise Refusal(f"TaskStream: the task {stage.name} has no training rows; give it some, or leave it out.")
    batches, trainer = len(stage.rows.train_loader(lambda: 0, stage.steps)), running()
    found = batches if trainer is None else limited(batches, trainer)
    if not found and trainer is not None and trainer.limit_train_batches:
        raise Refusal(
            f"TaskStream: trainer.limit_train_batches {trainer.limit_train_batches} leaves nothing of the {batches} batches of the "
            f"task {stage.name}; raise it, or give a whole number."
        )
    return replace(stage, batches=found)


__all__ = ["JOINT", "Given", "stages_of"]
