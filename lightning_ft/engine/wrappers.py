"""The module's own methods, wrapped on its *instance* while a Trainer runs it.

Lightning offers callbacks no hook to edit a model before the optimizer is built, no way to add a loss term, and none to
edit gradients that survives a tuner. So five methods are wrapped:

    configure_model          the user's, then the model edits in phase order, each once
    training_step            the user's, then the loss terms; one dispatcher, since Lightning unwraps a single level
    backward                 per-term gradients, only where surgery asks for them
    on_before_optimizer_step surgery, then closed-form penalties, then the user's
    on_save/load_checkpoint  the checkpoint rule
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_ft.engine import checkpoints, compatibility
from lightning_ft.engine.gradients import audit, scale_
from lightning_ft.engine.randomness import GlobalState, seed_batch
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.engine.terms import Term
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    from lightning_ft.engine.attachment import Attachment


def replace_on(instance: Any, name: str, value: Any) -> Callable[[], None]:
    """Puts an attribute on one instance, past what its class says of it; what comes back takes it off again."""
    own = instance.__dict__.get(name)
    object.__setattr__(instance, name, value)

    def undo() -> None:
        if own is None:
            instance.__dict__.pop(name, None)
        else:
            object.__setattr__(instance, name, own)

    return undo


class Wrappers:
    """What stands around the methods of one module in one run; all of it leaves with the attachment."""

    def __init__(self, attachment: Attachment) -> None:
        """Args: attachment: whose module is wrapped, and what the wrappers ask."""
        self.attachment = attachment
        self.module = attachment.module
        self._audited = False
        self._own_step: Callable[..., Any] = self.module.training_step
        self._takes_index = True

    def put(self, stage: str) -> None:
        """Wraps what the stage needs; a run's end undoes it."""
        attachment, module = self.attachment, self.module
        attachment.on_leave(GlobalState.capture().restore)
        strict = module._strict_loading
        module.strict_loading = False  # our own comparison of key sets is stricter; see engine/checkpoints.py
        attachment.on_leave(lambda: setattr(module, "_strict_loading", strict))
        self._replace("configure_model", self._configure_model(is_overridden("configure_model", module)))
        # Modules of ours always dispatch (they hand over terms); a user's step is only wrapped while training.
        if stage == "fit":
            self._replace("training_step", self._training_step())
            attachment.step.frees = self._frees()
            self._replace("on_before_optimizer_step", self._on_before_optimizer_step())
            if attachment.term_gradients is not None:
                self._replace("backward", self._backward())
        self._replace("on_save_checkpoint", self._on_save_checkpoint())
        self._replace("on_load_checkpoint", self._on_load_checkpoint())
        strategy = attachment.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            before = strategy.trained
            strategy.trained = lambda: checkpoints.kept_keys(module)
            attachment.on_leave(lambda: setattr(strategy, "trained", before))
        checkpoints.make_atomic(strategy, attachment.on_leave)
        compatibility.keep_factors_in_fp32(strategy, attachment.on_leave)

    def _replace(self, name: str, wrapper: Callable[..., Any]) -> None:
        self.attachment.on_leave(replace_on(self.module, name, wrapper))

    def _configure_model(self, overridden: bool) -> Callable[[], None]:
        original = self.module.configure_model

        def configure_model() -> None:
            if overridden:
                original()
            self.attachment.apply_edits()

        return configure_model

    # -- the step ---------------------------------------------------------------------------------------------------

    def _training_step(self) -> Callable[..., Any]:
        original = self._own_step = self.module.training_step
        self._takes_index = is_param_in_hook_signature(original, "batch_idx", min_args=2)
        attachment = self.attachment

        def training_step(*args: Any, **kwargs: Any) -> Any:
            trainer, step = attachment.trainer, attachment.step
            attachment.begin_training()  # a tuner runs batches with the callbacks taken away, ours too
            if step.extra and not self.module.automatic_optimization:
                raise Refusal("Loss terms need automatic optimization; this module steps its optimizers by hand.")
            batch = args[0] if args else next(iter(kwargs.values()), None)
            progress = trainer.fit_loop.epoch_loop
            if (
                progress.batch_progress.current.ready % trainer.accumulate_grad_batches
                == 1 % trainer.accumulate_grad_batches
            ):
                step.begin_window()
            seed_batch(attachment.seed, progress.total_batch_idx, trainer.global_rank)
            step.own, step.asked = None, []
            for listener in step.before:
                listener(batch)
            output = original(*args, **kwargs)
            return step.total(batch, output)

        # Lightning unwraps one level of __wrapped__ to see whether batch_idx is wanted; FSDP2 adds a level of its own.
        # A signature with `self` survives both, whatever is wrapped around it.
        training_step.__signature__ = inspect.signature(getattr(original, "__func__", original))  # type: ignore[attr-defined]
        return training_step

    def rerun(self, batch: Any, batch_idx: int) -> list[Term]:
        """What is under the wrapper of ``training_step``, on another batch; see `Attachment.rerun`."""
        step = self.attachment.step
        own, muted = step.own, step.muted
        step.own, step.muted = None, True
        undo = [replace_on(self.module, name, lambda *_, **__: None) for name in ("log", "log_dict")]
        try:
            output = self._own_step(batch, batch_idx) if self._takes_index else self._own_step(batch)
            terms = step.own
        finally:
            step.own, step.muted = own, muted
            for put_back in undo:
                put_back()
        if terms is not None:
            return terms
        loss = output["loss"] if isinstance(output, Mapping) else output
        return [] if loss is None else [Term("loss", loss, 1.0, unit="mean")]

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _backward(self) -> Callable[..., None]:
        attachment = self.attachment

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            assert attachment.term_gradients is not None
            divisor = attachment.trainer.accumulate_grad_batches
            losses = [one / divisor for one in attachment.step.losses]
            attachment.term_gradients.accumulate(losses, attachment.trained(), attachment.step.owned)
            attachment.step.losses = []

        return backward

    def _frees(self) -> bool:
        """Whether the last window's gradients may go: no hook of Lightning's and no ``optimizer_zero_grad`` may want them."""
        module = self.module
        callbacks: list[Any] = self.attachment.trainer.callbacks  # type: ignore[attr-defined]
        seen = any(is_overridden("on_before_zero_grad", one) for one in (module, *callbacks))
        return module.automatic_optimization and not seen and not is_overridden("optimizer_zero_grad", module)

    def _on_before_optimizer_step(self) -> Callable[..., None]:
        original, attachment = self.module.on_before_optimizer_step, self.attachment

        def on_before_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
            if attachment.step.window.pending:
                self._correct()
            if attachment.term_gradients is not None:
                attachment.term_gradients.write_(attachment.trained())
            if not self._audited:
                # An optimizer that steps in backward has used the gradients up, and says of which.
                stepped: set[Tensor] = getattr(optimizer, "stepped", set())
                done = {n for n, p in self.module.named_parameters() if p in stepped}
                audit(self.module, attachment.may_lack_gradient | attachment.late | done)
                self._audited = True
            if attachment.gradient_edits:
                named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
                for edit in attachment.gradient_edits:
                    edit.edit_(named)
            original(optimizer)

        return on_before_optimizer_step

    def _correct(self) -> None:
        """Gradients of sums over a nominal number become gradients of the exact mean (loaders without totals)."""
        counted, numerator = self.attachment.step.window.correction()
        if self.attachment.ranks > 1:
            total = torch.tensor(counted, dtype=torch.float64, device=self.module.device)
            dist.all_reduce(total)
            counted = float(total)
        scale_(self.module.parameters(), numerator / max(counted, 1.0))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _on_save_checkpoint(self) -> Callable[[dict[str, Any]], None]:
        original = self.module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            checkpoints.write(self.attachment, checkpoint)

        return on_save_checkpoint

    def _on_load_checkpoint(self) -> Callable[[dict[str, Any]], None]:
        original = self.module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self.attachment.restore(checkpoint)
            original(checkpoint)

        return on_load_checkpoint
