"""Which of this library's modules learn from a teacher beside their own loss, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ft.engine.rollouts.module import RolloutModule
from lightning_ft.engine.teacher import SELF
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.classifier import CLASSIFIES


def check_student(module: Any, asked: Mapping[str, Any]) -> None:
    """Refuses a module that imitates nothing, and arguments that have no meaning for it.

    Args:
        module: one of this library's.
        asked: the arguments of `Distillation`, by name.

    Raises:
        Refusal: with what to do.
    """
    name = type(module).__name__
    if not getattr(module, "imitates", False):
        raise Refusal(
            f"Distillation compares what a model makes of the answers that it imitates, as SFT does, and {name} {_instead(module)}."
        )
    for argument in ("teacher_module", "student", "outputs", "mask"):
        if asked[argument] is not None:
            raise Refusal(
                f"Distillation.{argument} is for modules of your own; of {name} the parts are known, and its teacher is named by "
                "teacher: leave it out."
            )
    if asked["targets"] is not None and module.task in CLASSIFIES:
        raise Refusal(
            f"Distillation.targets keeps the likeliest tokens of language models, and the task is {module.task}; leave it out."
        )
    if asked["quantize"] is not None and asked["teacher"] == SELF and asked["targets"] is None:
        raise Refusal(
            "Distillation.quantize packs a teacher that is loaded, and self is the model that is trained; leave it out, or pack "
            "that (--model.quantize)."
        )


def _instead(module: Any) -> str:
    """What a module does that imitates no answers, and what to do."""
    if not isinstance(module, RolloutModule):
        return "compares answers with one another; distil first, or leave it out"
    if hasattr(module, "teacher"):
        return "has a teacher of its own, who corrects what it writes; name that by --model.teacher, and leave Distillation out"
    return "learns from rewards of answers that it writes itself; distil first (SFT, OnPolicyDistillation), or leave it out"


__all__ = ["check_student"]
