"""Where a run was within its tasks, and the proof that one which is resumed goes on with the very batches that were left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ft.data.task_course import Course
from lightning_ft.functional.errors import Refusal


def place_of(course: Course, learned: Sequence[str]) -> dict[str, Any]:
    """What decides the batches of a course, in plain types."""
    return {
        "format": 1,
        "names": [stage.name for stage in course.stages],
        "learned": list(learned),
        "sizes": list(course.sizes),
        "deals": {stage.name: stage.rows.deal() for stage in course.stages},
    }


def check_tasks(state: Mapping[str, Any], course: Course) -> None:
    """Refuses a checkpoint of other tasks.

    Raises:
        Refusal: with the names of both.
    """
    names = [stage.name for stage in course.stages]
    if state["names"] != names:
        raise Refusal(
            f"The checkpoint's run learns the tasks {', '.join(state['names'])}, and this one {', '.join(names)}; resume "
            "with the same, or begin a new fit that goes on from it (TaskStream.continue_from)."
        )


def go_to(state: Mapping[str, Any], course: Course, done: int) -> None:
    """Lets the task that is trained go on after ``done`` micro-batches of the run.

    Raises:
        Refusal: where the epochs so far had other sizes.
    """
    epoch = course.epoch_at(done)
    if state["sizes"][: epoch + 1] != course.sizes[: epoch + 1]:
        raise Refusal(
            f"The checkpoint's run had {state['sizes'][: epoch + 1]} micro-batches in its epochs so far, and this one has "
            f"{course.sizes[: epoch + 1]}; resume with the same rows, batch size, devices and epochs a task."
        )
    if epoch < course.epochs and done > course.begins[epoch]:
        stage = course.stages[course.stage_of_epoch[epoch]]
        stage.rows.resume(state["deals"][stage.name], done - course.begins[epoch])


__all__ = ["check_tasks", "go_to", "place_of"]
