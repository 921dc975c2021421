"""The base of techniques that hold parameters to what earlier tasks left, by a quadratic penalty in the gradients.

A task ends where the task stream says so; without one a fit is a task, which ends with its last epoch. What was measured then is in
the checkpoint, and the next fit is held to it: the same callback's, or one that is given the file.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_ft.engine.anchors import Anchors
from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.importance import trained_names
from lightning_ft.engine.tasks import Task, baseline_of, require_tasks
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Cannot
from lightning_ft.functional.errors import Refusal

CANNOT = (
    Cannot("fp16", "it adds to gradients that may still be scaled", "use bf16-mixed or 32-true"),
    Cannot(
        "unfreezing",
        "what it has measured belongs to parts that were trained from the start",
        "choose what is trained once, by freeze",
    ),
    Cannot(
        "orthogonal_lora",
        "each task trains factors of its own, and those of earlier tasks are frozen anyway",
        "use lora, or leave the penalty out",
    ),
)
"""What no penalty of this kind can meet."""


class QuadraticPenalty(Technique):
    """Adds ``lam A (theta - c)`` to the gradients; subclasses say how importances are measured.

    Subclasses store ``lam``, ``load_from`` and ``name`` beside their own arguments and call `_reset` in the constructor.
    """

    lam: float
    load_from: str | None
    name: str

    def _reset(self) -> None:
        self._held = Anchors()
        """What this fit is held to."""
        self._next: Anchors | None = None
        """What the next one will be held to, once a fit without a task stream is over."""
        self._stored: dict[str, Any] | None = None
        self._run: tuple[pl.Trainer, pl.LightningModule] | None = None
        self._measured_at = -1
        self._saved = True

    @property
    def asks(self) -> bool:
        """Whether importances are measured by what a module says of examples (`lightning_ft.engine.likelihood`)."""
        return True

    # -- for subclasses -----------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], task: int
    ) -> dict[str, Tensor]:
        """The importance of every trained number for the task that has ended, by name."""

    def absorb(self, anchors: Anchors, importance: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Adds what was measured to what is known of earlier tasks, all of it around where the last one ended."""
        anchors.move(importance, values, 1.0)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, resumed: bool) -> None:
        """Called when training starts and what is held to is known."""

    def forget_task(self) -> None:
        """Called when a task's measurements are over, before the next one begins."""

    def own_state(self) -> dict[str, Any]:
        """Further state, of plain types."""
        return {}

    def load_own_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes back what `own_state` gave."""

    # -- the run --------------------------------------------------------------------------------------------------------

    def resolved_arguments(self) -> dict[str, Any]:
        """Without the file that an earlier run started from."""
        return {**arguments_of(self), "load_from": None}

    def register(self, attachment: Attachment) -> None:
        """Edits the gradients of this run."""
        attachment.gradient_edit(self)
        if not attachment.installed and attachment._trainer is None:
            return  # `lightning_ft.load` only rebuilds what was trained
        trainer = attachment.trainer
        self._refuse_streamed(trainer)
        why = getattr(attachment.module, "no_likelihood", None)
        if self.asks and why:
            raise Refusal(
                f"{type(self).__name__} measures what matters by the likelihood of each task, and "
                f"{type(attachment.module).__name__} {why}; use si, or ewc with importance uniform."
            )
        if hasattr(getattr(trainer, "datamodule", None), "tells_tasks"):
            require_tasks(trainer, type(self).__name__)
        if trainer.state.fn == "fit" and trainer.ckpt_path is None and self.load_from is not None and self._is_new:
            self._stored = self._read(self.load_from)

    def _refuse_streamed(self, trainer: pl.Trainer) -> None:
        """Refuses rows that are read as they come: a pass over all of them, where the task ends, would have no end."""
        if (
            self.asks
            and trainer.state.fn == "fit"
            and getattr(getattr(trainer, "datamodule", None), "streaming", False)
        ):
            raise Refusal(
                f"{type(self).__name__} goes over the rows of a task once more where it ends, and rows that are streamed have no "
                "end: set streaming false (--data.streaming false), or use si, or ewc with importance uniform, which need no rows."
            )

    def _refuse_endless(self, trainer: pl.Trainer) -> None:
        """The same of a user's own loader, before the first step."""
        if self.asks and trainer.num_training_batches == float("inf"):
            raise Refusal(
                f"{type(self).__name__} goes over the rows of a task once more where it ends, and the training loader does not say "
                "how many batches it has: give trainer.limit_train_batches a number, or the data set a __len__; or use si, or ewc "
                "with importance uniform, which ask for no rows."
            )

    @property
    def _is_new(self) -> bool:
        return not self._held.tasks and self._next is None and self._stored is None

    def _read(self, path: str) -> dict[str, Any]:
        file = Path(path).expanduser()
        kind = type(self).__name__
        if not file.exists():
            raise Refusal(
                f"{kind}.load_from names {path}, which does not exist; give the checkpoint of an earlier fit."
            )
        checkpoint = torch.load(file / "meta.pt" if file.is_dir() else file, map_location="cpu", weights_only=True)
        states = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(f"{kind}[")}
        state = states.get(self.state_key)
        if state is None and len(states) == 1:
            state = next(iter(states.values()))
        if not state or not (state.get("held") or state.get("next")):
            raise Refusal(
                f"{kind}.load_from names {path}, which holds no importances of {kind}; give a checkpoint that was saved after a "
                f"task had ended in a run with {kind}."
            )
        return dict(state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored: lays out what earlier tasks left, and refuses it where other parts are trained now."""
        super().on_train_start(trainer, pl_module)
        if baseline_of(trainer) is not None:
            return
        self._refuse_endless(trainer)
        self._run = (trainer, pl_module)
        parameters, resumed = trained_names(pl_module), trainer.ckpt_path is not None
        own: Mapping[str, Any] = {}
        if self._stored is not None:
            stored, self._stored = self._stored, None
            self._held, own = Anchors.load(stored.get("held", {})), stored.get("own", {})
            self._next = Anchors.load(stored["next"]) if stored.get("next") else None
        if not resumed and self._next is not None:
            self._held, self._next, own = self._next, None, {}
            self.forget_task()
        for anchors in (self._held, self._next):
            if anchors is not None:
                anchors.fits(parameters, type(self).__name__)
                anchors.lay_out(parameters)
        if own and resumed:
            self.load_own_state(own, parameters)
        self._measured_at = trainer.global_step if self._next is not None else -1
        self.begin(trainer, pl_module, resumed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A fit that goes on has not ended after all."""
        if self._run is not None:
            self._next = None

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        """Adds the penalty's gradient, once a step, the same on every rank."""
        if not self.lam or not self._held.tasks or self._run is None:
            return
        trainer, module = self._run
        named = {name.replace("_orig_mod.", ""): p for name, p in parameters.items()}
        self._held.fits(named, type(self).__name__)
        if trainer._logger_connector.should_update_logs:
            module.log(f"train/{self.instance_name}", self._held.value(named, self.lam))
        self._held.add_gradients_(named, self.lam)

    # -- where a task ends ----------------------------------------------------------------------------------------------

    def on_task_end(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> None:
        """Measures what the task needs, by its own rows."""
        self._absorb(trainer, module, task.batches(), task.index, self._held)
        self.forget_task()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a task stream the fit is the task; the last epoch's checkpoint is written after this."""
        steps, epochs = trainer.max_steps, trainer.max_epochs
        by_steps = steps is not None and 0 <= steps <= trainer.global_step
        by_epochs = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
        if by_steps or by_epochs:
            self._end_fit(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """However a fit has ended, the last checkpoint holds what was measured."""
        self._end_fit(trainer, pl_module)
        if not self._saved:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
                    _save_at(trainer, callback.last_model_path, callback.save_weights_only)

    def _end_fit(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        stream = hasattr(getattr(trainer, "datamodule", None), "tells_tasks")
        if self._run is None or stream or self._measured_at == trainer.global_step:
            return
        anchors = self._held.copy()
        self._absorb(trainer, module, _rows(trainer), anchors.tasks, anchors)
        self._next, self._saved = anchors, False
        self._measured_at = trainer.global_step

    def _absorb(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], task: int, anchors: Anchors
    ) -> None:
        importance = self.measure(trainer, module, batches, task)
        values: Mapping[str, Tensor] = trained_names(module)
        self.absorb(anchors, importance, values)

    def report(self, trainer: pl.Trainer, **numbers: float) -> None:
        """Logs numbers of a task's end under the technique's name."""
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.instance_name}/{k}": v for k, v in numbers.items()}, trainer.global_step)

    # -- state ------------------------------------------------------------------------------------------------------------

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets the module go; what was measured stays for the next fit."""
        self._run = None
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        self._run = None
        super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What was measured is in this file."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self._saved = True

    def state_dict(self) -> dict[str, Any]:
        """What is held to, what the next fit will be held to, and what a task in training has gathered."""
        if self._stored is not None:
            return self._stored
        parts = {
            "held": self._held.state(),
            "next": self._next.state() if self._next is not None else {},
            "own": self.own_state(),
        }
        return parts if any(parts.values()) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until the model is restored, too."""
        self._reset()
        self._stored = dict(state_dict) or None


def _save_at(trainer: pl.Trainer, path: str, weights_only: bool) -> None:
    """A file of its own: behind a link (``save_last="link"``) is that of an earlier step, the best one perhaps."""
    trainer.strategy.barrier()
    if trainer.is_global_zero and os.path.islink(path):
        os.unlink(path)
    trainer.strategy.barrier()
    trainer.save_checkpoint(path, weights_only)


def _rows(trainer: pl.Trainer) -> Iterator[Any]:
    """The training rows of a fit, each once where the data module knows how; nothing is drawn before the first is asked for."""
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "in_order"):
        yield from data.in_order()["train"]
        return
    yield from islice(cast("Iterable[Any]", trainer.train_dataloader), int(trainer.num_training_batches))
