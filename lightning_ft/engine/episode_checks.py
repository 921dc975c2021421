"""What of a module with an inner loop is refused, as far as arguments and a first pass tell it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import get_args

from torch import Tensor

from lightning_ft.functional.episode_losses import LOSSES, LossName
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.preference import LOSSES as PREFERENCES


def check_losses(owner: str, task: str | None, losses: dict[str, str], beta: float | None) -> None:
    """Refuses losses that a task cannot have, and a number of another task.

    Args:
        owner: the module's class, for sentences.
        task: of a base; None: a net learns.
        losses: argument -> the loss that it names.
        beta: of dpo.

    Raises:
        Refusal: ``MAML.inner_loss is mse, and the task dpo has auto or sigmoid or ...``
    """
    if beta is not None and task != "dpo":
        raise Refusal(f"{owner}.beta is of the task dpo, and {_learns(task)} learns by another loss; leave it out.")
    fitting: Collection[str] = LOSSES
    if task == "dpo":
        fitting = [name for name in get_args(LossName) if name in PREFERENCES]
    elif task is not None:
        fitting = [name for name in LOSSES if (name == "cross_entropy") == (task != "regression")]
    for argument, given in losses.items():
        if given not in ("auto", *fitting):
            raise Refusal(f"{owner}.{argument} is {given}, and {_learns(task)} has {' or '.join(['auto', *fitting])}.")


def _learns(task: str | None) -> str:
    return "a net" if task is None else f"the task {task}"


def check_outputs(outputs: Tensor, targets: Tensor, owner: str) -> None:
    """Refuses a net with fewer outputs than an episode has classes.

    Raises:
        Refusal: ``MAML.net gives 2 outputs, and the episodes have 5 classes; ...``
    """
    if targets.is_floating_point() or outputs.ndim < 2:
        return
    classes = int(targets.max()) + 1
    if outputs.shape[-1] < classes:
        raise Refusal(
            f"{owner}.net gives {outputs.shape[-1]} outputs, and the episodes have {classes} classes; give it an output for each, "
            f"or set data.way to {outputs.shape[-1]}."
        )


def check_steps(owner: str, eval_steps: Sequence[int] | None) -> None:
    """Refuses numbers of steps that are none.

    Raises:
        Refusal: ``MAML.eval_steps must be numbers of steps, 0 or more, got [-1].``
    """
    if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in eval_steps or ()):
        raise Refusal(f"{owner}.eval_steps must be numbers of steps, 0 or more, got {eval_steps}.")


__all__ = ["check_losses", "check_outputs", "check_steps"]
