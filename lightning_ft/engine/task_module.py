"""A module of several tasks: what it is told of them, by its arguments or by its data, and what a checkpoint keeps of that."""

from __future__ import annotations

from typing import Any

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.module import FineTuningModule
from lightning_ft.engine.task_list import (
    KnownTask,
    Objective,
    check_names_of,
    check_task_name,
    compare_tasks,
    known_tasks,
)
from lightning_ft.functional.errors import Refusal

_SEEN = "lightning_ft_rows_seen"


class TaskModule(FineTuningModule):
    """Subclasses store ``objectives``, ``labels``, ``several``, ``weights`` and ``baselines``, and make `_known` when they load."""

    trains_several_tasks = True
    """Tells the rules of `lightning_ft.engine.compatibility`, and techniques."""
    objectives: dict[str, Objective] | None
    several: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[str, KnownTask] = {}
        self.rows_seen: dict[str, float] = {}
        """Task -> its rows that were trained on, over all ranks."""

    def resolved_arguments(self) -> dict[str, Any]:
        """With the tasks that were taken from the data, which need not be there when a checkpoint is loaded."""
        arguments = arguments_of(self)
        if self._known:
            arguments["objectives"] = {name: task.objective for name, task in self._known.items()}
            arguments["labels"] = {name: task.labels for name, task in self._known.items() if task.labels is not None}
            arguments["several"] = [name for name, task in self._known.items() if task.several]
        return arguments

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in their order; of a run the data's."""
        there = getattr(self.datamodule, "task_names", None)
        return [name for name in self.asked() if there is None or name in there]

    @property
    def squared_tasks(self) -> list[str]:
        """Tasks whose loss is a squared error."""
        return [name for name, task in self.asked().items() if task.objective == "regression"]

    def add_task(
        self, name: str, objective: Objective, labels: list[str] | None = None, *, several: bool = False
    ) -> None:
        """Adds a task to a module, one that `lightning_ft.load` gave, say; its head is made when the next run begins.

        Args:
            name: of the task, as the data will call it.
            objective: what it learns.
            labels: names of its classes.
            several: whether a row may have several.
        """
        check_task_name(name, "add_task")
        if name in self.asked():
            raise Refusal(f"The module has a task {name!r} already; give the new one another name.")
        self._known = {**self.asked(), name: KnownTask(objective, labels, several)}

    def asked(self) -> dict[str, KnownTask]:
        """Those known, given, or told by the data."""
        given: Any = self.labels
        return self._known or known_tasks(self.datamodule, self.objectives, given, self.several)

    def setup(self, stage: str) -> None:
        """Compares the tasks with the data's, before any weight is loaded."""
        known = self.asked() if hasattr(self.datamodule, "task_objectives") else {}
        compare_tasks(self.datamodule, known, fits=stage == "fit")
        if stage == "predict":
            return
        asked = ("objectives", "labels", "several", "weights", "baselines")
        told = {argument: getattr(self, argument, None) for argument in asked}
        check_names_of(told, {**known, **self.datamodule.tasks}, self.task_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How many rows of each task were trained on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SEEN] = dict(self.rows_seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on counting."""
        super().on_load_checkpoint(checkpoint)
        self.rows_seen = dict(checkpoint.get(_SEEN, {}))


__all__ = ["TaskModule"]
