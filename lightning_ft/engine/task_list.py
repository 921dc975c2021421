"""Which tasks a multi-task module has: those given, with what its data tell of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_ft.functional.errors import Refusal

Objective = Literal["causal_lm", "sequence_classification", "token_classification", "regression", "reward", "dpo"]
BY_TOKEN = ("causal_lm", "token_classification")
SPEAKING = ("causal_lm", "dpo")
"""Those that need the base's own language head."""
OF_PAIRS = ("reward", "dpo")
PAIRS = "pairs"
"""What data of pairs tell, since the same pairs may teach a reward or a policy."""


@dataclass(frozen=True)
class KnownTask:
    """One task.

    Attributes:
        objective: what it learns.
        labels: names of its classes in order; None without classes.
        several: whether a row may have several classes, or none.
    """

    objective: Objective
    labels: list[str] | None = None
    several: bool = False


def known_tasks(
    data: Any,
    objectives: Mapping[str, Objective] | None,
    labels: Mapping[str, list[str]] | None,
    several: list[str] | None,
) -> dict[str, KnownTask]:
    """Task -> what is known of it: as given, else as told by the data.

    Args:
        data: a `MultiTaskData`, or None.
        objectives: given ones; tasks of the data that they leave out are asked of the data.
        labels: given ones.
        several: given ones; None asks the data.

    Raises:
        Refusal: neither given nor told, or pairs without a word on what they teach.
    """
    told: dict[str, Any] = data.task_objectives() if hasattr(data, "task_objectives") else {}
    given = dict(objectives or {})
    found = {name: given.get(name, what) for name, what in told.items()} if set(given) < set(told) else given
    if not found:
        raise Refusal("MultiTask needs MultiTaskData, which names the tasks; or name them (model.objectives).")
    for name, what in found.items():
        if what == PAIRS:
            raise Refusal(
                f"The task {name!r} has pairs of answers, which teach a reward or a policy: set model.objectives.{name} to reward "
                "or to dpo."
            )
    names = {**(data.task_labels() if told else {}), **(labels or {})}
    many = several if several is not None else (data.several_labels() if told else [])
    return {name: KnownTask(what, names.get(name), name in many) for name, what in found.items()}


def compare_tasks(data: Any, known: Mapping[str, KnownTask], *, fits: bool) -> None:
    """Refuses data that are not of several tasks, or whose tasks are others than the module's.

    Args:
        data: of the run.
        known: the module's.
        fits: whether the run trains, so that the data must have all tasks unless they leave some out by ``only``.
    """
    if not hasattr(data, "task_objectives"):
        raise Refusal(
            f"MultiTask reads batches of MultiTaskData, got {type(data).__name__ if data is not None else 'none'}."
        )
    theirs, told = data.task_objectives(), data.task_labels()
    for name, task in known.items():
        if name not in theirs:
            continue
        same = task.objective in OF_PAIRS if theirs[name] == PAIRS else task.objective == theirs[name]
        if not same or (task.labels is not None and told.get(name) != task.labels):
            raise Refusal(
                f"The task {name!r} is {task.objective} {task.labels or ''} for the module and {theirs[name]} "
                f"{told.get(name) or ''} in the data; give both the same."
            )
    missing = [name for name in theirs if name not in known]
    if missing or (list(theirs) != list(known) and data.only is None and fits):
        raise Refusal(
            f"The data's tasks are {', '.join(theirs)}, the module's {', '.join(known)}; they must be the same, in one order "
            f"(add_task adds one to a module that was loaded)."
        )


__all__ = ["BY_TOKEN", "OF_PAIRS", "PAIRS", "SPEAKING", "KnownTask", "Objective", "compare_tasks", "known_tasks"]
