"""What a task stream puts into a Trainer: it calls the hooks of tasks, measures all of them, and restarts the optimizer.

Everything is told from counters that a checkpoint holds, and each step is done where it is found undone: so it does not
matter at which point a run was killed, or which of Lightning's hooks a resumed one happens to skip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_ft.data.batch_hooks import lend_hooks, return_hooks
from lightning_ft.data.named_files import Split
from lightning_ft.data.task_continue import go_on_from
from lightning_ft.data.task_course import (
    begun,
    epochs_to_count,
    refuse_early_stopping,
    refuse_second_fit,
    refuse_unbegun,
    settle,
)
from lightning_ft.data.task_scores import Scores, said_unmeasured
from lightning_ft.engine.tasks import Task
from lightning_ft.engine.wrappers import replace_on
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    from lightning_ft.data.task_stream import TaskStream


class TaskCatchUp(Callback):
    """The last to hear of a start: a file saved after the very last batch has left the last task's end to be done.

    No epoch follows in such a run, and only now has every other callback what its state was.
    """

    def __init__(self, dispatch: TaskDispatch) -> None:
        """Args: dispatch: of the same stream."""
        self.dispatch = dispatch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of the last task, if all was trained."""
        if begun(trainer) >= self.dispatch.stream.course.begins[-1]:
            self.dispatch.on_train_epoch_end(trainer, pl_module)


class TaskDispatch(Callback):
    """Calls the hooks of tasks and keeps their scores; made by the stream for one run."""

    def __init__(self, stream: TaskStream) -> None:
        """Args: stream: whose tasks they are."""
        self.stream = stream
        self._most: int | None = None
        self._undo: list[Callable[[], None]] = []
        self._measured: Scores = {}
        self._loader = 0
        self._telling: int | None = None  # the stage whose hook is called now
        self._done: int | None = None  # micro-batches done, where a next one has been drawn already
        self._first: list[tuple[list[dict[str, Any]], Any]] = []

    # -- joining and leaving ----------------------------------------------------------------------------------------

    def join(self, trainer: pl.Trainer, stage: str) -> None:
        """Takes a place in front of the callbacks, and one behind them; called by the stream's setup, before theirs."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in [c for c in callbacks if isinstance(c, TaskDispatch)]:  # left by a run that failed in its setup
            other.leave(trainer)
        rest = [c for c in callbacks if not isinstance(c, (TaskDispatch, TaskCatchUp))]
        catch_up = TaskCatchUp(self)
        trainer.callbacks = [self, *rest, catch_up]  # type: ignore[attr-defined]

        def take_out() -> None:
            # Another list: Lightning goes through this one meanwhile, and would pass over the next callback's teardown.
            trainer.callbacks = [c for c in trainer.callbacks if c not in (self, catch_up)]  # type: ignore[attr-defined]

        self._undo.append(take_out)
        lend_hooks(self.stream, lambda loader: self._owner(trainer, loader), joint=self.stream.baseline == "joint")
        self._undo.append(lambda: return_hooks(self.stream))
        if stage != "fit":
            return
        loop = trainer.fit_loop
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        self._most = most = loop.max_epochs
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        self._undo.append(lambda: setattr(trainer, "reload_dataloaders_every_n_epochs", every))
        self._undo.append(lambda: setattr(loop, "max_epochs", most))

    def _owner(self, trainer: pl.Trainer, loader: int) -> pl.LightningDataModule:
        """The data module whose batch is on its way, as loader number ``loader`` of those that are gone through now."""
        modules = self.stream._modules()
        if len(modules) == 1:
            return next(iter(modules.values()))
        if trainer.training:
            course, done = self.stream.course, begun(trainer)
            stage = self._telling if self._telling is not None else course.stage_of_epoch[course.epoch_at(done)]
            name = course.stages[stage].name
        else:
            split: Split = "test" if trainer.testing else "predict" if trainer.predicting else "val"
            name = self.stream.names(split)[loader]
        return modules.get(name) or next(iter(modules.values()))  # joint: all of this library

    def allow_epochs(self, trainer: pl.Trainer) -> None:
        """Lets the Trainer go to the end of the stream, and no further."""
        trainer.fit_loop.max_epochs = epochs_to_count(self.stream.course, trainer, self._most)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets the module be measured task by task, whatever it knows of several loaders."""
        if stage == "fit":
            refuse_unbegun(self.stream.course, trainer, self._most)
            refuse_early_stopping(trainer)
            refuse_second_fit(trainer)
        for kind in ("validation", "test"):
            self._take_loaders_apart(trainer, pl_module, kind)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the Trainer and the module as they were."""
        self.leave(trainer)

    def leave(self, trainer: pl.Trainer) -> None:
        """Undoes what was changed; safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def _take_loaders_apart(self, trainer: pl.Trainer, module: pl.LightningModule, kind: str) -> None:
        split = "val" if kind == "validation" else kind
        name = f"{kind}_step"
        if not is_overridden(name, module):
            return
        step, takes = getattr(module, name), is_param_in_hook_signature(getattr(module, name), "dataloader_idx")
        ours = hasattr(module, "lightning_ft_module")
        end = getattr(module, f"on_{kind}_epoch_end")

        def one_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if ours and dataloader_idx != self._loader:
                self._collect(module, end, split)
                self._loader = dataloader_idx
            return step(batch, batch_idx, dataloader_idx) if takes else step(batch, batch_idx)

        def epoch_end() -> None:
            self._collect(module, end, split)
            self._log_by_task(module)

        self._undo.append(replace_on(module, name, one_step))
        if ours:
            self._undo.append(replace_on(module, f"on_{kind}_epoch_end", epoch_end))

    # -- measuring --------------------------------------------------------------------------------------------------

    def _collect(self, module: pl.LightningModule, end: Callable[[], None], split: str) -> None:
        """What a module of ours would log at the end of one loader."""
        found: dict[str, float] = {}

        def record(name: str, value: Any, **_: Any) -> None:
            found[name] = float(value)

        undo = replace_on(module, "log", record)
        try:
            end()
        finally:
            undo()
        names = self.stream.names(split)  # type: ignore[arg-type]
        self._measured[names[self._loader]] = found

    def _log_by_task(self, module: pl.LightningModule) -> None:
        """Each metric under its own name as the mean over the tasks, and beside it that of each task."""
        names = list(dict.fromkeys(name for found in self._measured.values() for name in found))
        several = module.trainer.world_size > 1
        for name in names:
            values = [found[name] for found in self._measured.values() if name in found]
            means = {name: sum(values) / len(values)}
            means |= {f"{name}/{task}": found[name] for task, found in self._measured.items() if name in found}
            for key, value in means.items():  # equal on all ranks, each value having been summed over them
                module.log(key, torch.tensor(value, dtype=torch.float32), prog_bar=key == name, sync_dist=several)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what was measured before."""
        self._measured, self._loader = {}, 0

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what was measured before."""
        self._measured, self._loader = {}, 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the scores, before a checkpoint of them is saved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not self._measured:
            self._measured = self._logged(trainer)
            self._write_by_task(trainer)
        stream = self.stream
        stream.scores.check(self._measured)
        stream.measured_at = done = begun(trainer) if self._done is None else self._done
        if done == 0 and stream.learned:  # by earlier runs: what is measured comes after the last task of theirs
            stream.scores.rows[stream.learned[-1]] = {
                **self._measured,
                **stream.scores.rows.get(stream.learned[-1], {}),
            }
        elif done == 0:
            stream.scores.start = self._measured
        else:
            stage = stream.course.stage_of_epoch[stream.course.epoch_at(done - 1)]
            stream.scores.rows[stream.course.stages[stage].name] = self._measured

    def _logged(self, trainer: pl.Trainer) -> Scores:
        """What a user's module has logged of each loader, by Lightning's own suffix."""
        names = self.stream.names()
        scores: Scores = {name: {} for name in names}
        for key, value in trainer.callback_metrics.items():
            metric, _, number = key.partition("/dataloader_idx_")
            if number.isdigit() and int(number) < len(names):
                scores[names[int(number)]][metric] = float(value)
            elif len(names) == 1:
                scores[names[0]][key] = float(value)
        return scores

    def _write_by_task(self, trainer: pl.Trainer) -> None:
        if len(self._measured) < 2:
            return
        named = {f"{metric}/{task}": v for task, found in self._measured.items() for metric, v in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _validate(self, trainer: pl.Trainer, done: int) -> None:
        """As Lightning does within an epoch."""
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        first, self._done = connector._first_loop_iter, done
        loop.val_loop.restarting = False  # of a resumed run, whose counters are those of an earlier validation
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter, self._done = first, None

    # -- the hooks of tasks -----------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on from an earlier run, says what is not measured, and remembers how optimizer and schedule begin."""
        if self.stream.continue_from is not None and trainer.ckpt_path is None:
            go_on_from(self.stream.continue_from, trainer, pl_module)
        said = said_unmeasured(list(self.stream._parts), self.stream.names()) if trainer.enable_validation else None
        if said is not None:
            rank_zero_info(said)
        # Before a checkpoint that is resumed is restored.
        for optimizer in trainer.optimizers:
            groups = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            self._first.append((groups, optimizer))
        self._schedules = [copy.deepcopy(one.scheduler.state_dict()) for one in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where all counters are restored."""
        self.stream.check_resumed()
        settle(self.stream.course, trainer)
        self.allow_epochs(trainer)
        done = begun(trainer)
        if not trainer.fit_loop.epoch_loop.restarting and done not in self.stream.course.begins:
            raise Refusal(
                "The run that wrote the checkpoint was stopped by max_steps in the middle of an epoch, and Lightning would begin a "
                "new one; give trainer.max_steps here too (any larger number), so that it goes on where it was."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first task's start, or the next one's."""
        self._come_to(begun(trainer), trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The same, where a resumed run had no start of an epoch; and the proof that the batch is the right one."""
        done = begun(trainer) - 1
        course = self.stream.course
        epoch = course.epoch_at(done)
        if epoch >= course.epochs or done - course.begins[epoch] != batch_idx:
            raise RuntimeError(f"Batch {batch_idx} of an epoch is number {done} of all: the stream has lost its place.")
        self._come_to(done, trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The task's end, if it was its last epoch."""
        done, stream = begun(trainer), self.stream
        while stream.ended < stream.begun and done >= stream.course.end_of(stream.ended):
            self._finish(trainer, pl_module)

    def _come_to(self, done: int, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Does what has to be done before micro-batch number ``done`` is trained."""
        stream, course = self.stream, self.stream.course
        if done == 0 and stream.measure_start and stream.measured_at < 0 and trainer.enable_validation:
            self._validate(trainer, 0)
        stage = course.stage_of_epoch[course.epoch_at(done)]
        while stream.begun <= stage:
            if stream.ended < stream.begun:
                self._finish(trainer, module)
            if stream.begun > 0 and stream.optimizer == "restart":
                self._restart(trainer, module)
            stream.begun += 1
            self._call("on_task_start", trainer, module, stream.begun - 1)

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        stream = self.stream
        done = stream.course.end_of(stream.ended)
        if stream.measured_at != done and trainer.enable_validation:
            self._validate(trainer, done)
        joint = stream.baseline == "joint"
        for name, value in stream.scores.metrics(joint).items():
            several = trainer.world_size > 1
            module.log(f"continual/{name}", torch.tensor(value, dtype=torch.float32), sync_dist=several, on_epoch=True)
        folder = trainer.log_dir if trainer.loggers else None  # all ranks ask: it is broadcast
        if folder is not None and trainer.is_global_zero and stream.scores.rows:
            stream.scores.write(Path(folder))
        self._call("on_task_end", trainer, module, stream.ended)
        stream.ended += 1

    def _call(self, hook: str, trainer: pl.Trainer, module: pl.LightningModule, stage: int) -> None:
        if not self.stream.tells_tasks:
            return
        task: Task = self.stream.task_at(stage)
        out = self.stream.baseline is not None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._telling = stage
        for one in [*callbacks, module]:
            sits_out = out and getattr(getattr(one, "traits", None), "continual", False)
            called = getattr(one, hook, None)
            if callable(called) and not sits_out:
                called(trainer, module, task)
        self._telling = None

    def _restart(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The optimizer and schedule as the run began with them, in place."""
        for groups, optimizer in self._first:
            optimizer.state.clear()
            if not hasattr(module, "lightning_ft_module"):
                for group, first in zip(optimizer.param_groups, groups, strict=True):
                    group.update(copy.copy(first))
        if hasattr(module, "lightning_ft_module"):
            return  # its schedule knows where tasks begin
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))


__all__ = ["TaskDispatch"]
