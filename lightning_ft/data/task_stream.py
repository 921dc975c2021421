"""Data for continual learning: tasks that are trained one after the other in one fit, and measured all the time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ft.data.made_of_modules import MadeOfModules
from lightning_ft.data.named_files import Split
from lightning_ft.data.task_arguments import Amount, check_given
from lightning_ft.data.task_continue import check_labels, classes_in, read, stream_state
from lightning_ft.data.task_course import Course, Stage, begun, next_epoch
from lightning_ft.data.task_cut import Cut, cut_source, cut_tasks
from lightning_ft.data.task_dispatch import TaskDispatch
from lightning_ft.data.task_parts import JointTask, PlainTask, PlannedTask, class_mask
from lightning_ft.data.task_scores import TaskScores
from lightning_ft.data.task_split import Groups
from lightning_ft.data.task_stages import JOINT, Given, stages_of
from lightning_ft.data.task_state import check_tasks, go_to, place_of
from lightning_ft.data.token_rows import Report
from lightning_ft.engine.arguments import describe
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.scoring import CLASS_MASK
from lightning_ft.engine.tasks import Task
from lightning_ft.functional.errors import Refusal


class TaskStream(MadeOfModules):
    """Tasks that are learned one after the other, each without the rows of the others, and measured all the time.

    The tasks are data modules of their own, or one data set cut by class or by a column. One fit trains them in order, for
    so many epochs or steps each, and validates on all of them, past and future: one loader a task, whose results are logged
    under the task's name (``val/accuracy/NAME``). After each task the matrix of scores is complete by a row: average,
    backward and forward transfer and forgetting are logged as ``continual/...``, and the matrix is written as
    ``task_matrix.csv`` and ``task_matrix.svg`` into the run's folder. An epoch of the Trainer is an epoch of one task, and
    the stream says how many there are: ``trainer.max_epochs: -1`` will do.

    Args:
        tasks: data modules in the order of training, as a list or by name. Ours, or any whose loaders are plain DataLoaders
            of map-style data sets; the stream deals their rows, so that a run is resumed exactly within a task.
        source: instead, one data module whose rows are cut into tasks.
        by: how: ``class``, or the name of a column, such as ``domain``.
        groups: how many classes a task has, in their order; or which values (classes, domains) each task has, in the
            order of training. None: each value is a task, classes in their order, others as they first come.
        epochs: passes over the rows of a task: for all, one a task, or by name.
        steps: optimizer steps of a task instead, over rows that are drawn pass after pass.
        scenario: what is known when a row is judged. ``domain``: nothing, and all tasks have the same answers. ``class``:
            nothing, and each task brings classes; the head has all of them from the start, and those not seen so far are
            masked. ``task``: of which task the row is, so that only its classes compete. ``free``: as ``domain``, and
            techniques are not told where a task ends. Masks need ClassificationData; a module of your own finds what to mask
            in the task that its hooks are given.
        optimizer: what becomes of the optimizer where a task begins: ``restart`` forgets its moments and begins the
            schedule of the learning rate anew, as if the task were a run of its own; ``keep`` leaves both alone, with one
            schedule over all tasks.
        baseline: what continual learning is compared with, by one flag: ``naive`` trains as configured while all continual
            techniques sit out; ``joint`` does too, and trains on the rows of all tasks at once, each masked as its own task's.
        continue_from: a checkpoint whose run has learned some of the tasks, or others: the weights, what continual techniques
            have kept and the matrix go on from there, with a new optimizer. Tasks of a name that was trained there
            are only measured. (``ckpt_path`` resumes the same run instead.)
        metric: what fills the matrix, as it is logged in validation; None: ``val/accuracy`` where it is there, else
            ``val/loss``, and the usual other spellings.
        mode: which way of it is better; None: told from its name, less of a loss and more of all else.
        measure_start: validate before the first task, which forward transfer is compared with.

    Raises:
        Refusal: arguments that contradict each other; from ``setup`` data that cannot be cut or dealt.

    Example:
        >>> from lightning_ft import ClassificationData
        >>> TaskStream(source=ClassificationData("reviews.csv"), by="domain", epochs=2)
        TaskStream(source=ClassificationData(path='reviews.csv'), by='domain', epochs=2)

    References:
        van de Ven and Tolias, 2019 (scenarios); Lopez-Paz and Ranzato, 2017, equations 2 to 4; Chaudhry et al., 2018, equation 3.
    """

    def __init__(
        self,
        tasks: list[pl.LightningDataModule] | dict[str, pl.LightningDataModule] | None = None,
        *,
        source: pl.LightningDataModule | None = None,
        by: str | None = None,
        groups: Groups | None = None,
        epochs: Amount = 1,
        steps: Amount | None = None,
        scenario: Literal["domain", "class", "task", "free"] = "domain",
        optimizer: Literal["restart", "keep"] = "restart",
        baseline: Literal["naive", "joint"] | None = None,
        continue_from: str | None = None,
        metric: str | None = None,
        mode: Literal["max", "min"] | None = None,
        measure_start: bool = True,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.source = source
        self.by = by
        self.groups = groups
        self.epochs = epochs
        self.steps = steps
        self.scenario = scenario
        self.optimizer = optimizer
        self.baseline = baseline
        self.continue_from = continue_from
        self.metric = metric
        self.mode = mode
        self.measure_start = measure_start
        self.scores = TaskScores(metric, mode)
        self.begun = self.ended = 0  # tasks of this run whose hooks were called
        self.measured_at = -1  # micro-batches done at the last validation
        self.learned: list[str] = []  # names of the tasks that earlier runs have trained
        self._known: dict[str, tuple[int, ...] | None] = {}  # their classes
        self._parts: dict[str, PlannedTask | PlainTask] = {}
        self._classes: dict[str, tuple[int, ...] | None] = {}
        self._course: Course | None = None
        self._dispatch: TaskDispatch | None = None
        check_given(self)

    def _modules(self) -> dict[str, pl.LightningDataModule]:
        """The data modules that were given, by name."""
        if self.tasks is None:
            assert self.source is not None
            return {"source": self.source}
        if isinstance(self.tasks, dict):
            return dict(self.tasks)
        return {f"task_{number}": data for number, data in enumerate(self.tasks)}

    def __repr__(self) -> str:
        return describe(self)

    __str__ = __repr__

    # -- what the run asks -----------------------------------------------------------------------------------------

    @property
    def tells_tasks(self) -> bool:
        """Whether techniques are told of tasks."""
        return self.scenario != "free"

    @property
    def task(self) -> Task | None:
        """The task that is trained; None before the first, and where tasks are not told."""
        return self.task_at(self.begun - 1) if self.begun and self.tells_tasks else None

    @property
    def task_count(self) -> int:
        """How many tasks will have been trained when this run is over, those of earlier runs counted."""
        return len(self.learned) + sum(name not in self.learned for name in self._parts)

    @property
    def course(self) -> Course:
        """The stages of the present fit; made when first asked for, from the Trainer's limits."""
        if self._course is None:
            self._course = Course(self._stages())
        return self._course

    def task_at(self, stage: int) -> Task:
        """The task of a stage of this run."""
        at = self.course.stages[stage]

        def batches() -> Iterator[Any]:
            yield from at.rows.loader("train") or ()

        return Task(len(self.learned) + stage, at.name, batches, at.classes, at.seen)

    def in_first_pass(self) -> bool:
        """Whether the micro-batch that is trained belongs to the first pass over the rows of its task."""
        if self.trainer is None:
            return True
        done, course = begun(self.trainer) - 1, self.course
        epoch = course.epoch_at(done)
        number = course.stage_of_epoch[epoch]
        at = course.stages[number]
        if at.steps is not None:  # all of them one epoch, over rows pass after pass
            return done - course.begins[epoch] < at.rows.first_pass()
        return epoch == course.first_epoch(number)

    def optimizer_steps(self) -> list[int]:
        """Optimizer steps between two beginnings of the learning rate's schedule."""
        assert self.trainer is not None
        steps = self.course.steps(self.trainer.accumulate_grad_batches)
        return steps if self.optimizer == "restart" else [sum(steps)]

    def class_counts(self) -> list[int]:
        """Training rows of each class, over all tasks."""
        counts = [task.data.class_counts() for task in self._ours()]  # type: ignore[attr-defined]
        return [int(count) for count in np.sum(counts, axis=0)]

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Sets the data modules up, cuts them into tasks, and puts what calls the hooks into the Trainer."""
        for data in self._modules().values():
            data.trainer = self.trainer
            data.setup(stage)  # type: ignore[arg-type]
        self._course = None
        self._parts, self._classes = {}, {}
        for cut in self._cut():
            if cut.name in self._parts:
                raise Refusal(f"TaskStream has two tasks called {cut.name!r}; name them otherwise.")
            self._parts[cut.name], self._classes[cut.name] = cut.rows, cut.classes
        if self.baseline == "joint":
            self._classes[JOINT] = tuple(sorted({n for found in self._classes.values() for n in found or ()})) or None
        if self.scenario in ("class", "task"):
            self._mask()
        if self.trainer is not None:
            if stage == "fit":
                self.begun, self.ended, self.measured_at = 0, 0, -1
                self.learned, self._at, self._resumed, self._known = [], None, None, {}
                self.scores = TaskScores(self.metric, self.mode)
                self.scores.tasks = list(self._parts)
                if self.continue_from is not None:
                    before = stream_state(read(self.continue_from, mapped=True), self.continue_from)
                    check_labels(before["labels"], self.label_names(), self.continue_from)
                    self.learned, self._known = before["learned"], before["classes"]
                    self.scores.load(before["scores"])
            self._dispatch = TaskDispatch(self)
            self._dispatch.join(self.trainer, stage or "fit")

    def _mask(self) -> None:
        """Lets the batches of classified rows say which classes compete."""
        names = self.label_names()
        for name, part in self._named():
            if names is None or self.resolved_task() != "sequence_classification" or self.multi_label():
                raise Refusal(
                    f"TaskStream.scenario {self.scenario} masks classes, and the rows of {name} do not have one class each, as "
                    "ClassificationData reads them; take the scenario domain."
                )
            part.mask(len(names), self._competing if self.scenario == "class" else partial(self._classes.get, name))

    def _competing(self) -> tuple[int, ...] | None:
        """The classes of all tasks up to the one that is trained; before the first, all."""
        known = [*self.learned, *self._begun_names]
        return tuple(sorted({n for name in known for n in self._classes_of(name) or ()})) if known else None

    def _classes_of(self, task: str) -> tuple[int, ...] | None:
        """Also of a task that an earlier run has learned and this one does not list."""
        return self._classes[task] if task in self._classes else self._known.get(task)

    @property
    def _begun_names(self) -> list[str]:
        return [stage.name for stage in self.course.stages[: self.begun]] if self._at is None else self._at

    _at: list[str] | None = None  # of a checkpoint that is only measured

    def remask(self, batch: Any) -> None:
        """Rows of earlier tasks that are trained again compete with the classes that do now."""
        if self.scenario == "class" and isinstance(batch, Batch) and (now := self._competing()) is not None:
            batch.columns[CLASS_MASK] = class_mask(len(self.label_names() or ()), now, len(batch.rows))

    def on_exception(self, exception: BaseException) -> None:
        """Lightning calls no teardown after one."""
        if self._dispatch is not None and self.trainer is not None:
            self._dispatch.leave(self.trainer)

    def train_dataloader(self) -> Any:
        """The present epoch of the present task."""
        trainer, course = self.trainer, self.course
        number = 0
        if trainer is not None:
            number = course.stage_of_epoch[min(next_epoch(course, trainer), course.epochs - 1)]
            if self._dispatch is not None and trainer.state.fn == TrainerFn.FITTING:
                self._dispatch.allow_epochs(trainer)  # before Lightning asks whether there is anything left to do
        return self._train_loader(course.stages[number], number)

    def _train_loader(self, stage: Stage, number: int) -> Any:
        def epoch() -> int:
            trainer, course = self.trainer, self.course
            return max(0, next_epoch(course, trainer) - course.first_epoch(number)) if trainer is not None else 0

        return stage.rows.train_loader(epoch, stage.steps)

    def val_dataloader(self) -> list[Any]:
        """One loader for each task that has rows to validate on, in the order of `names`."""
        return list(self._loaders("val").values())

    def test_dataloader(self) -> list[Any]:
        """The same of rows to test."""
        return list(self._loaders("test").values())

    def predict_dataloader(self) -> list[Any]:
        """The same of rows to predict."""
        return list(self._loaders("predict").values())

    def names(self, split: Split = "val") -> list[str]:
        """The tasks that have rows of a split."""
        return list(self._loaders(split))

    def _loaders(self, split: Split) -> dict[str, Any]:
        loaders = {name: part.loader(split) for name, part in self._parts.items()}
        return {name: loader for name, loader in loaders.items() if loader is not None}

    def in_order(self) -> dict[str, Any]:
        """The rows of every task and split that is set up, each once and in file order."""
        found = {}
        for task, part in self._parts.items():
            for split in ("train", "val", "test", "predict"):
                loader = part.loader(split)  # type: ignore[arg-type]
                if loader is not None:
                    found[f"{task}/{split}"] = loader
        return found

    # -- for people -------------------------------------------------------------------------------------------------

    def reports(self) -> dict[str, Report]:
        """What became of the rows of each task and split."""
        if not self._parts:
            self.setup()
        rows = {f"{name}/{split}": r for name, part in self._named() for split, r in part.data._rows.items()}
        return {name: one.report for name, one in rows.items()}

    # -- what a checkpoint holds ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which tasks are done, their scores, and what decides the batches that remain."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return {}
        return {
            **place_of(self.course, self.learned),
            "classes": {
                name: None if (found := self._classes_of(name)) is None else list(found)
                for name in dict.fromkeys([*self.learned, *self._classes])
            },
            "labels": self.label_names(),
            "begun": self.begun,
            "ended": self.ended,
            "measured_at": self.measured_at,
            "scores": self.scores.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the run was.

        Raises:
            Refusal: other tasks, or rows that would now be dealt otherwise.
        """
        if self.trainer is None or not state_dict:
            return
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.learned, self._known = list(state_dict["learned"]), classes_in(state_dict)
            self._at = list(state_dict["names"])[: int(state_dict["begun"])]
            return
        check_tasks(state_dict, self.course)
        self.begun, self.ended = int(state_dict["begun"]), int(state_dict["ended"])
        self.measured_at, self.learned = int(state_dict["measured_at"]), list(state_dict["learned"])
        self._known = classes_in(state_dict)
        self.scores.load(state_dict["scores"])
        self._resumed = state_dict
        # Lightning restores its counters later than ours; `TaskDispatch.on_train_start` comes back with them.
        self.check_resumed()

    _resumed: dict[str, Any] | None = None

    def check_resumed(self) -> None:
        """Refuses a resumed run whose remaining batches would be others; waits until the counters are restored."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer is not None else 0
        if self._resumed is not None and done:
            go_to(self._resumed, self.course, int(done))
            self._resumed = None

    # -- cutting ------------------------------------------------------------------------------------------------------

    def _ours(self) -> list[PlannedTask]:
        return [part for part in self._parts.values() if isinstance(part, PlannedTask)]

    def _named(self) -> list[tuple[str, PlannedTask]]:
        return [(name, part) for name, part in self._parts.items() if isinstance(part, PlannedTask)]

    def _cut(self) -> Iterator[Cut]:
        if self.source is not None:
            assert self.by is not None
            return cut_source(self.source, self.by, self.groups, self._running)
        return cut_tasks(self._modules(), self.label_names(), self._running)

    def _running(self) -> pl.Trainer | None:
        return self.trainer

    def _stages(self) -> list[Stage]:
        """Of this fit: tasks that earlier runs have learned are left out."""
        stages = stages_of(
            Given(self._parts, {**self._known, **self._classes}, self.epochs, self.steps),
            self.learned,
            self._running,
            joint=self.baseline == "joint",
        )
        if self.scenario == "task" and isinstance(rows := stages[0].rows, JointTask):
            rows.mask_each(len(self.label_names() or ()), [self._classes[name] or () for name in self._parts])
        return stages


__all__ = ["TaskStream"]
