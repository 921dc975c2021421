"""What a task stream is given, and which of it contradicts itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from lightning_ft.engine.arguments import check_arguments
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    from lightning_ft.data.task_stream import TaskStream

Amount = Annotated[int, Ge(1)] | list[int] | dict[str, int]
"""One for all tasks, one a task in their order, or by name."""


def check_given(stream: TaskStream) -> None:
    """Refuses a stream whose arguments cannot all be meant.

    Raises:
        Refusal: naming the two that contradict each other, and what to do.
    """
    check_arguments(stream)
    if (stream.tasks is None) == (stream.source is None):
        raise Refusal(
            "TaskStream takes either tasks (data modules) or source (one, cut by `by`): give exactly one of them."
        )
    if (stream.source is None) != (stream.by is None):
        raise Refusal("TaskStream.source is cut by TaskStream.by (class, or a column): give both or neither.")
    if stream.groups is not None and stream.source is None:
        raise Refusal("TaskStream.groups says how source is cut, and there is none; order the tasks themselves.")
    if stream.tasks is not None and not len(stream.tasks):
        raise Refusal("TaskStream.tasks is empty: give one data module or more.")
    if stream.steps is not None and stream.epochs != 1:
        raise Refusal("TaskStream.epochs and TaskStream.steps both say how long a task lasts: give one of them.")
    if stream.baseline == "joint" and stream.continue_from is not None:
        raise Refusal("TaskStream.baseline joint trains on all tasks from the start; leave continue_from out.")
    for data in stream._modules().values():
        if getattr(data, "streaming", False):
            raise Refusal(
                f"TaskStream needs to know how many rows a task has, and {type(data).__name__} streams them; set streaming "
                "false."
            )


def amounts(given: Amount | None, names: Sequence[str], argument: str) -> dict[str, int | None]:
    """How much of each task there is, by name.

    Args:
        given: epochs, or steps; None where they do not say.
        names: of all tasks, in their order.
        argument: which of the two it is.

    Raises:
        Refusal: another number of entries than of tasks, or one below 1.
    """
    if given is None or isinstance(given, int):
        return dict.fromkeys(names, given)
    if isinstance(given, dict) and set(given) != set(names) or len(given) != len(names):
        raise Refusal(
            f"TaskStream.{argument} has {len(given)} entries ({given}) for the tasks {', '.join(names)}; give one number, or "
            "one a task."
        )
    found = [given[name] for name in names] if isinstance(given, dict) else list(given)
    if any(isinstance(amount, bool) or not isinstance(amount, int) or amount < 1 for amount in found):
        raise Refusal(f"TaskStream.{argument} must be at least 1 for each task, got {given}.")
    return dict(zip(names, found, strict=True))


__all__ = ["Amount", "amounts", "check_given"]
