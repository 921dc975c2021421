"""What is measured of several tasks on held-out rows: each by its own measures, and means over all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_ft.engine.evaluation import (
    ClassEvaluation,
    Evaluation,
    LanguageEvaluation,
    MultilabelEvaluation,
    PairEvaluation,
    ValueEvaluation,
)
from lightning_ft.engine.task_list import OF_PAIRS, KnownTask
from lightning_ft.functional.relative_improvement import relative_improvement

MAIN = {
    "causal_lm": "accuracy",
    "sequence_classification": "accuracy",
    "token_classification": "f1",
    "regression": "pearson",
    "reward": "accuracy",
    "dpo": "accuracy",
}
"""The measure that speaks for a task in means over tasks; larger is better for each."""


class Seen(Protocol):
    """What the model says of a task's rows, as `lightning_ft.objectives.multitask.Outcome` has it."""

    @property
    def losses(self) -> Tensor: ...  # noqa: D102
    @property
    def logits(self) -> Tensor | None: ...  # noqa: D102
    @property
    def targets(self) -> Tensor: ...  # noqa: D102
    @property
    def correct(self) -> Tensor | None: ...  # noqa: D102
    @property
    def segments(self) -> Tensor | None: ...  # noqa: D102


class TaskMeasures(nn.ModuleDict):
    """Task -> its measures."""

    def add(self, name: str, task: KnownTask) -> None:
        """Makes those of one more task."""
        self[name] = _evaluation(task)

    def update(self, name: str, seen: Seen) -> None:  # type: ignore[override]
        """Adds rows of a task."""
        evaluation = self[name]
        if isinstance(evaluation, LanguageEvaluation):
            assert seen.correct is not None
            evaluation.update({"logprob": -seen.losses, "correct": seen.correct})
            return
        assert seen.logits is not None
        if isinstance(evaluation, ClassEvaluation):
            evaluation.update(seen.losses, seen.logits, seen.targets, seen.segments)
        elif isinstance(evaluation, PairEvaluation):
            evaluation.update(seen.losses, seen.logits)
        else:
            assert isinstance(evaluation, (MultilabelEvaluation, ValueEvaluation))
            logits = seen.logits[:, 0] if isinstance(evaluation, ValueEvaluation) else seen.logits
            evaluation.update(seen.losses, logits, seen.targets)

    def finished(
        self, known: Mapping[str, KnownTask], names: Sequence[str], baselines: Mapping[str, float] | None
    ) -> dict[str, Tensor | float]:
        """Name -> value over all ranks; then nothing is left of what was added.

        Args:
            known: all tasks.
            names: those that have rows to be measured on.
            baselines: task -> main measure of a model that was trained on it alone.

        Returns:
            ``TASK/MEASURE`` of each; ``loss``, the mean over tasks; ``macro``, the mean of the main measures where each has one;
            with baselines ``relative_improvement``, not a number where a task has no main measure (one row has no pearson).
        """
        values: dict[str, Tensor | float] = {}
        main: dict[str, float] = {}
        losses = []
        for name in names:
            found: dict[str, Tensor] = self[name].compute()  # type: ignore[operator]
            values |= {f"{name}/{measure}": value for measure, value in found.items()}
            losses.append(found["loss"])
            if (value := found.get(MAIN[known[name].objective])) is not None:
                main[name] = float(value)
        if not losses:
            return values
        values["loss"] = torch.stack(losses).nanmean()
        if len(main) == len(names):
            values["macro"] = sum(main.values()) / len(main)
        if baselines:
            values["relative_improvement"] = relative_improvement(
                {name: main.get(name, math.nan) for name in names}, baselines
            )
        return values


def _evaluation(task: KnownTask) -> Evaluation:
    if task.objective == "causal_lm":
        return LanguageEvaluation()
    if task.objective == "regression":
        return ValueEvaluation()
    if task.objective in OF_PAIRS:
        return PairEvaluation()
    return MultilabelEvaluation(len(task.labels or [])) if task.several else ClassEvaluation(task.labels or [])


__all__ = ["MAIN", "Seen", "TaskMeasures"]
