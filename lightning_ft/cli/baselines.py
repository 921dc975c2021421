"""``fit --baselines true``: after a run of several tasks, each task alone for as many rows, and what sharing has brought."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ft.cli import compare
from lightning_ft.cli.readable import number
from lightning_ft.engine.task_list import SPEAKING
from lightning_ft.engine.task_measures import MAIN
from lightning_ft.engine.technique import Technique
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.relative_improvement import relative_improvement

BASELINES = "baselines.json"
DECIDED = ("--name", "--baselines", "--seed_everything", "--ckpt_path", "--trainer.max_steps", "--trainer.max_epochs")
SHARING = ("balancing", "surgery", "task_sampling")
"""Slots of what decides between tasks, and means nothing where there is one."""


@dataclass(frozen=True)
class Single:
    """One task beside its baseline.

    Attributes:
        task: its name.
        measure: what is compared; larger is better.
        together: that of the run of all tasks.
        alone: that of a model trained on the task alone.
        steps: of the baseline.
    """

    task: str
    measure: str
    together: float
    alone: float
    steps: int

    @property
    def delta(self) -> float:
        """(together - alone) / |alone|; NaN beside a baseline of 0."""
        return relative_improvement({self.task: self.together}, {self.task: self.alone})


def refuse_baselines(module: Any, data: Any, trainer: Any, slots: Collection[str]) -> None:
    """Refuses, before a model is loaded, a run that has no baselines.

    Args:
        module: the LightningModule.
        data: its data module.
        trainer: of the run.
        slots: those that were filled, which a baseline can leave empty.
    """
    if not hasattr(data, "task_objectives") or not getattr(module, "trains_several_tasks", False):
        raise Refusal(
            f"--baselines trains each task of MultiTask alone, and {type(module).__name__} has none; leave it out."
        )
    if data.only is not None:
        raise Refusal(
            f"--baselines trains each task alone, and data.only {data.only} is one already; leave one of them out."
        )
    silent = [n for n, what in {**data.task_objectives(), **(module.objectives or {})}.items() if what not in SPEAKING]
    for one in (one for one in trainer.callbacks if isinstance(one, Technique)):
        slot = one.traits.slot
        if slot in SHARING and slot not in slots:
            raise Refusal(
                f"--baselines trains each task alone, without {type(one).__name__}, which lies in trainer.callbacks; give it as "
                f"the slot {slot}."
            )
        if slot in ("samples", "generation") and silent:
            raise Refusal(
                f"--baselines trains each task alone with what the run has, and {type(one).__name__} wants texts, which "
                f"{silent[0]} does not write; leave one of the two out."
            )
    for name, one in data.tasks.items():
        if one.val_path is None and not one.val_fraction:
            raise Refusal(
                f"--baselines compares on held-out rows, and the task {name} has none: give it a val_fraction or a val_path."
            )


def steps_alone(rows: dict[str, float], per_step: int) -> dict[str, int]:
    """Task -> optimizer steps in which its model sees as many of its rows as the run of all did.

    Args:
        rows: task -> rows that the run of all tasks was trained on.
        per_step: rows a step, accumulation and devices included.
    """
    return {name: max(1, round(count / per_step)) for name, count in rows.items()}


def train_baselines(argv: list[str], folder: Path, module: Any, data: Any, trainer: Any, slots: list[str]) -> None:
    """Trains them, each in a process of its own, prints the table and writes `BASELINES` into the run's folder.

    A baseline that is finished under the same configuration is kept, one that was interrupted goes on.

    Args:
        argv: the words after ``fit`` of the run of all tasks.
        folder: of that run; baselines lie beside it, in ``NAME-alone``.
        module: trained.
        data: of the run.
        trainer: of the run.
        slots: those that were filled.

    Raises:
        Refusal: a baseline failed.
    """
    per_step = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    seed, found = int(os.environ.get("PL_GLOBAL_SEED", "0")), []
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    objectives = {name: task.objective for name, task in module._known.items()}
    for task, steps in steps_alone(module.rows_seen, per_step).items():
        metric = f"val/{task}/{MAIN[objectives[task]]}"
        words = [*shared_words(argv), f"--data.init_args.only={task}", "--baselines=false"]
        # One epoch of whole steps: the last one of an epoch may hold fewer rows.
        words += [
            f"--trainer.max_steps={steps}",
            "--trainer.max_epochs=-1",
            f"--data.init_args.epoch_rows={steps * per_step}",
        ]
        words += [f"--{slot}=null" for slot in slots if slot in SHARING]
        plan = compare.Plan(task, words)
        compare.check(plan, f"{folder.name}-alone", metric, has_time=False)
        print(f"{task} alone, {steps} steps: ", end="", flush=True)
        outcome = compare.run(plan, seed)
        print(compare.told(outcome, metric), flush=True)
        alone = outcome.score(metric)
        if alone is None or metric not in measured:
            raise Refusal(f"The baseline of {task} has no {metric}: {outcome.error or 'it was not measured'}.")
        found.append(Single(task, metric.rpartition("/")[2], measured[metric], alone, steps))
    write(folder, found)
    print(f"\n{table(found)}")


def shared_words(argv: list[str]) -> list[str]:
    """The run's words without those that each baseline decides."""
    kept, at = [], 0
    while at < len(argv):
        word = argv[at]
        joined = "=" in word or at + 1 == len(argv)
        if word.partition("=")[0] in DECIDED:
            at += 1 if joined else 2
            continue
        kept.append(word)
        at += 1
    return kept


def mean_delta(found: list[Single]) -> float:
    """The mean over tasks of (M - B) / |B| (Maninis et al., 2019, equation 4)."""
    return sum(one.delta for one in found) / len(found)


def table(found: list[Single]) -> str:
    """As Markdown: a row a task, and the mean."""
    lines = ["| task | measure | together | alone | steps alone | delta |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {one.task} | {one.measure} | {number(one.together)} | {number(one.alone)} | {one.steps} | {change(one.delta)} |"
        for one in found
    ]
    return "\n".join([*lines, f"| mean (Delta m) | | | | | {change(mean_delta(found))} |"])


def change(delta: float | None) -> str:
    """A relative improvement: ``+3.1%``; a dash where there is none, beside a baseline of 0."""
    return number(delta) if delta is None or math.isnan(delta) else f"{delta:+.1%}"


def write(folder: Path, found: list[Single]) -> None:
    """What `lightning-ft report` shows."""
    told = {
        "tasks": [{**vars(one), "delta": _known(one.delta)} for one in found],
        "mean_delta": _known(mean_delta(found)),
    }
    (folder / BASELINES).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _known(delta: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(delta) else delta


__all__ = [
    "BASELINES",
    "Single",
    "change",
    "mean_delta",
    "refuse_baselines",
    "shared_words",
    "steps_alone",
    "table",
    "train_baselines",
]
