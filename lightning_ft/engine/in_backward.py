"""The optimizer's step inside backward: each parameter is updated and its gradient freed as soon as it is complete.

A step then never holds all gradients at once, which in full training are as large as the model (Lv et al., 2023, LOMO;
here with AdamW's moments, as in torchtune). Nothing that needs all gradients together can follow: they are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer

from lightning_ft.engine.compatibility import WORDS, situation
from lightning_ft.engine.optimizer import build_optimizer
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_ft.engine.attachment import Attachment


class InBackward(Optimizer):
    """Steps each parameter during backward, right after its gradient is complete, and frees that gradient.

    Weights and state dict are those of the same optimizer stepping after backward, bit for bit; what is saved is the memory of the
    gradients. Use it in full training: with LoRA gradients are small.

    Args:
        params: parameters or groups; each group's own rate and decay hold, and a scheduler may change them.
        lr: rate of groups that have none.
        optimizer: what steps one parameter: a factory as `SFT` takes it; None is AdamW, fused, betas .9 and .999.

    What cannot follow is refused when a run with this library's modules or callbacks begins: accumulation, clipping, edits of the
    gradients, several ranks or tasks, fp16 scaling, loaders that do not count their windows.

    Example::

        SFT("starter:smollm2-135m", optimizer=InBackward)

    References:
        Lv et al., 2023, "Full parameter fine-tuning for large language models with limited resources", section 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
    ) -> None:
        listed = list(params)
        groups: list[dict[str, Any]]
        groups = [dict(group) for group in listed] if listed and isinstance(listed[0], dict) else [{"params": listed}]
        for group in groups:
            group["params"] = list(group["params"])
            group.setdefault("lr", lr)
        whole = build_optimizer(groups, optimizer)  # for its groups alone: they hold every setting then
        super().__init__(whole.param_groups, whole.defaults)
        self._group_of: dict[Tensor, int] = {}
        self._own: dict[Tensor, Optimizer] = {}
        self._stepping = False
        self.stepped: set[Tensor] = set()
        """Parameters that the present step has updated; a step's gradients are gone when it could be asked for them."""
        handles = []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                self._group_of[parameter] = index
                self._own[parameter] = build_optimizer([{**group, "params": [parameter]}], optimizer)
                trains = parameter.requires_grad
                parameter.requires_grad_(True)  # one that is thawed later takes its hook now
                handles.append(parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self))))
                parameter.requires_grad_(trains)
        self._share_state()
        weakref.finalize(self, _remove, handles)

    def _share_state(self) -> None:
        """One state for all, so that the state dict is that of the optimizer that does the same after backward."""
        for own in self._own.values():
            own.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer itself would."""
        super().load_state_dict(state_dict)
        self._share_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Runs the closure, whose backward steps; gradients that were there already are stepped with after it."""
        self.stepped = set()
        loss = None
        if closure is not None:
            self._stepping = True
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self._stepping = False
        for parameter in self._own:
            if parameter.grad is not None:
                self.step_one(parameter)
        return loss

    def step_one(self, parameter: Tensor) -> None:
        """Updates one parameter by its gradient, at its group's present rate, and frees the gradient."""
        if parameter in self.stepped:
            raise Refusal(
                "A parameter got gradients from two backward passes within one step, and InBackward has applied the first already; "
                "add the losses up and call backward once, or use an ordinary optimizer."
            )
        own = self._own[parameter]
        own.param_groups[0].update(
            {k: v for k, v in self.param_groups[self._group_of[parameter]].items() if k != "params"}
        )
        own.step()
        parameter.grad = None
        self.stepped.add(parameter)


def _hook(owner: weakref.ref[InBackward]) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimizer, and with it its state, alive after the run."""

    def step(parameter: Tensor) -> None:
        optimizer = owner()
        if optimizer is not None and optimizer._stepping:
            optimizer.step_one(parameter)

    return step


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def used(trainer: pl.Trainer) -> bool:
    """Whether one of the run's optimizers steps in backward."""
    return any(isinstance(optimizer, InBackward) for optimizer in trainer.optimizers)


def check(attachment: Attachment) -> None:
    """Refuses what needs gradients after backward, where an optimizer steps in it.

    Raises:
        Refusal: ``InBackward cannot work with gradient clipping, because ...``
    """
    trainer = attachment.trainer
    if not used(trainer):
        return
    words = situation(trainer, attachment.module).words
    schedules = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    accumulates = trainer.accumulate_grad_batches > 1 or any(max(c.scheduling.values()) > 1 for c in schedules)
    refused = (
        (
            accumulates,
            "accumulation",
            "each micro-batch would be a step of its own",
            "set accumulate_grad_batches to 1",
        ),
        (trainer.gradient_clip_val, "gradient clipping", "the norm of all gradients is known too late", "leave it out"),
        (
            attachment.edits_gradients,
            "techniques that edit gradients",
            "these are applied and gone before they could be edited",
            "use an ordinary optimizer",
        ),
        (
            words & {"ddp", "fsdp2", "several_ranks"},
            "several ranks",
            "each would step with its own gradients, before they are averaged",
            "use one device, or an ordinary optimizer",
        ),
        (
            len(getattr(attachment.module, "task_names", ())) > 1,
            "several tasks",
            "the head of a task that a step lacks would be moved by momentum",
            "use an ordinary optimizer",
        ),
        ("fp16" in words, WORDS["fp16"], "gradients are applied before they are unscaled", "use bf16-mixed or 32-true"),
    )
    for met, what, why, fix in refused:
        if met:
            raise Refusal(f"InBackward cannot work with {what}, because {why}; {fix}.")


def refuse_uncounted(trainer: pl.Trainer) -> None:
    """Refuses a loader that does not count its windows: gradients would have to be corrected after backward.

    Raises:
        Refusal: where an optimizer steps in backward.
    """
    if used(trainer):
        raise Refusal(
            "InBackward cannot work with a loader that does not count its accumulation windows, because their gradients are "
            "corrected after backward; use one of this library's data modules, or an ordinary optimizer."
        )
