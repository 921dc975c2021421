"""Which steps of a fit are logged, what is logged of every one, and the validation after the last."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class StepLog(Callback):
    """Logs the learning rate and the gradient's norm, at steps that suit short runs and long ones.

    Lightning logs each n-th step for one n, so that a run of fewer steps leaves no curve at all. And it ends at ``max_steps``
    without a validation where that is no epoch's end: here the last step is validated, so that every run has a score.

    Args:
        thin: choose the steps by `interval`; False keeps ``trainer.log_every_n_steps`` as the user gave it.
    """

    def __init__(self, *, thin: bool) -> None:
        self.thin = thin

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before Lightning compares the interval with the number of batches, and warns."""
        self._set_interval(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The rate that the coming step takes: the largest of all groups."""
        self._set_interval(trainer)
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if rates:
            pl_module.log("train/lr", max(rates), rank_zero_only=True)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The norm of the loss's gradient, unscaled, before it is clipped or edited; only where the step is logged."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            norm = gradient_norm(pl_module)
            if norm is not None:
                pl_module.log("train/grad_norm", norm, rank_zero_only=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks to stop at the last step, since Lightning validates (and logs) where a run is asked to."""
        if trainer.max_steps is not None and 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def _set_interval(self, trainer: pl.Trainer) -> None:
        if self.thin and trainer.log_every_n_steps:  # type: ignore[attr-defined]  # 0: log nothing
            trainer.log_every_n_steps = interval(trainer.global_step + 1)  # type: ignore[attr-defined]


def interval(step: int) -> int:
    """Every how many steps are logged around this one, counted from 1: all at first, later each tenth.

    A function of the step alone, so that a resumed run logs the same ones.
    """
    return 1 if step <= 20 else 2 if step <= 50 else 5 if step <= 100 else 10


def gradient_norm(module: nn.Module) -> Tensor | None:
    """The Euclidean norm of all gradients together (over all shards, where they are sharded); None when there are none."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and not p.grad.is_sparse]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    norms = []
    for group in (sharded, whole):
        if group:
            norm = nn.utils.get_total_norm(group)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.stack(norms).norm() if norms else None
