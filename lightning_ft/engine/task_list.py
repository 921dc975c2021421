"""Which tasks a multi-task module has: those given, with what its data tell of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name

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
        objectives: given ones; tasks of the data that they leave out are asked of the data. Those that a run leaves out by
            ``only`` do not count.
        labels: given ones.
        several: given ones; None asks the data.

    Raises:
        Refusal: neither given nor told, or pairs without a word on what they teach.
    """
    told: dict[str, Any] = data.task_objectives() if hasattr(data, "task_objectives") else {}
    given = dict(objectives or {})
    if told and data.only is not None:  # one task of those that the arguments know
        given = {name: what for name, what in given.items() if name in told}
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


def check_task_name(name: str, what: str) -> None:
    """Refuses a name that a module cannot hold a part by: of the heads, the measures.

    Raises:
        Refusal: ``MultiTaskData.tasks: no task can be called 'type', ...``
    """
    check_name(name, what)
    if hasattr(nn.ModuleDict(), name):
        raise Refusal(
            f"{what}: no task can be called {name!r}, which is an attribute of torch's ModuleDict that holds the heads by their "
            f"names; call it {name}_task, say."
        )


def check_names_of(
    told: Mapping[str, Collection[str] | None], names: Collection[str], complete: Collection[str]
) -> None:
    """Refuses an argument that speaks of tasks that are not there, or baselines that leave some out.

    Args:
        told: argument of `MultiTask` -> the tasks that it speaks of, or None.
        names: of all tasks, those that the run leaves out among them.
        complete: those that are measured.
    """
    for argument, named in told.items():
        unknown = sorted(set(named or ()) - set(names))
        if unknown:
            raise Refusal(f"MultiTask.{argument} names {unknown[0]!r}, and the tasks are {', '.join(names)}.")
    if lacking := sorted(set(complete) - set(told.get("baselines") or complete)):
        raise Refusal(
            f"MultiTask.baselines has no measure of {lacking[0]!r}, and the relative improvement is a mean over all tasks; add "
            "it, or leave baselines out."
        )


def refuse_one_task_a_step(trainer: Any, who: str) -> None:
    """Refuses what weighs tasks against one another where each step holds one.

    Args:
        trainer: of the run.
        who: does so.
    """
    data: Any = getattr(trainer, "datamodule", None)
    one = hasattr(data, "task_objectives") and data.batches == "homogeneous" and trainer.accumulate_grad_batches == 1
    if one and trainer.state.fn == "fit":
        raise Refusal(
            f"{who} weighs the tasks of a step against one another, and with homogeneous batches and no accumulation each step has "
            "one; set --data.batches mixed, or accumulate_grad_batches to more than 1."
        )


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


__all__ = [
    "BY_TOKEN",
    "OF_PAIRS",
    "PAIRS",
    "SPEAKING",
    "KnownTask",
    "Objective",
    "check_names_of",
    "check_task_name",
    "compare_tasks",
    "known_tasks",
    "refuse_one_task_a_step",
]
