"""Samplers, balancers and surgery against single tasks and plain mixing: eight tasks on one encoder, one budget.

    python -m benchmarks.multitask                     # all cells that are missing; about an hour on two cores
    python -m benchmarks.multitask --only pcgrad       # cells whose key contains this
    python -m benchmarks.multitask --render            # the table alone, from the kept results

Each of the four VADER domains gives two tasks: a class (is the mean rating above 0?) and the rating itself, scaled to -1 to 1.
Domains differ in size, so that samplers have something to do. A cell is (method, seed); single tasks get one cell each and share
the budget: each trains for the steps that it would get under plain mixing. Each cell is kept when done and skipped the next time.
Test rows, rate and trunk are the same for all; the seed draws heads, the choice of training rows and their order.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

OUTPUT = Path(__file__).resolve().parent / "results" / "multitask.json"
SIZES = {"tweets": 800, "amazonReviewSnippets": 400, "movieReviewSnippets": 200, "nytEditorialSnippets": 100}
TEST, STEPS, BATCH, LR, HEAD_LR, SEEDS = 300, 240, 32, 1e-4, 1e-3, (0, 1, 2)
SETTING = {"train": SIZES, "test": TEST, "steps": STEPS, "batch": BATCH, "lr": LR, "head_lr": HEAD_LR}
TASKS = [f"{domain}_{kind}" for domain in SIZES for kind in ("tone", "rating")]


def methods() -> dict[str, tuple[str, Callable[[], list[Any]]]]:
    """Name -> (what a task weighs, its callbacks, made anew for each run)."""
    from lightning_ft import GradientSurgery, LossBalancing, TaskSampling

    made: dict[str, tuple[str, Callable[[], list[Any]]]] = {
        "plain": ("rows", lambda: []),
        "equal weights": ("tasks", lambda: []),
        "temperature": ("rows", lambda: [TaskSampling("temperature", temperature=2.0)]),
        "uniform": ("rows", lambda: [TaskSampling("uniform")]),
        "annealed": ("rows", lambda: [TaskSampling("annealed")]),
        "loss_driven": ("rows", lambda: [TaskSampling("loss_driven", temperature=2.0)]),
        "uncertainty": ("tasks", lambda: [LossBalancing("uncertainty", lr=2.5)]),
        "dwa": ("tasks", lambda: [LossBalancing("dwa", every_steps=20)]),
        "gradnorm": ("tasks", lambda: [LossBalancing("gradnorm", alpha=0.12)]),
        "famo": ("tasks", lambda: [LossBalancing("famo")]),
    }
    for name in ("pcgrad", "cagrad", "mgda", "nash", "upgrad"):
        made[name] = ("tasks", lambda name=name: [GradientSurgery(name)])  # type: ignore[misc]
    return made


def write_rows(folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
    """Domain -> its training and test file; test rows do not depend on the seed, and no sentence is in both."""
    import numpy as np

    from lightning_ft.data.vader import ratings

    files = {}
    for domain, size in SIZES.items():
        rows = list(dict(reversed([(text, rating) for rating, text in ratings(domain)])).items())
        order = np.random.default_rng(zlib.crc32(domain.encode())).permutation(len(rows))
        train = np.random.default_rng(seed).permutation(order[TEST:])[:size]
        pair = []
        for part, chosen in (("train", train), ("test", order[:TEST])):
            path = folder / f"{domain}-{part}-{seed}.jsonl"
            told = [
                {"text": rows[n][0], "tone": "good" if rows[n][1] > 0 else "bad", "rating": rows[n][1] / 4}
                for n in chosen
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in told))
            pair.append(path)
        files[domain] = (pair[0], pair[1])
    return files


def run(weigh: str, callbacks: list[Any], seed: int, only: str | None, base: str, steps: int) -> dict[str, float]:
    """Task -> its measure on test rows: accuracy, or Pearson's correlation."""
    import lightning.pytorch as pl

    from lightning_ft import ClassificationData, MultiTask, MultiTaskData
    from lightning_ft.engine.task_measures import MAIN

    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tasks: dict[str, Any] = {}
        for domain, (train, test) in write_rows(folder, seed).items():
            for kind in ("tone", "rating"):
                tasks[f"{domain}_{kind}"] = ClassificationData(
                    str(train),
                    val_path=str(test),
                    label_column=kind,
                    labels=["bad", "good"] if kind == "tone" else None,
                    task="regression" if kind == "rating" else "sequence_classification",
                    truncation="keep_start",
                    max_length=64,
                    cache_dir=str(folder / "cache"),
                )
        data = MultiTaskData(
            tasks, batch_size=BATCH, val_batch_size=64, epoch_rows=BATCH * max(1, steps // 6), only=only
        )
        module = MultiTask(base, pool="mean", weigh=weigh, lr=LR, head_lr=HEAD_LR)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=6 if steps >= 6 else 1,
            gradient_clip_val=1.0,
            logger=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=place,
            callbacks=callbacks,
        )
        trainer.fit(module, data)
        judge = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=place,
        )
        (found, *_) = judge.validate(module, data, verbose=False)
    names = [only] if only else TASKS
    kinds = {"tone": "sequence_classification", "rating": "regression"}
    return {
        name: float(judge.callback_metrics[f"val/{name}/{MAIN[kinds[name.rpartition('_')[2]]]}"])
        for name in names
        if found
    }


def cells() -> list[str]:
    """Keys: method, seed, and of single tasks the task."""
    single = [f"single/{seed}/{task}" for seed in SEEDS for task in TASKS]
    return [*single, *(f"{name}/{seed}" for seed in SEEDS for name in methods())]


def measure(key: str, base: str = "starter:minilm-l6", steps: int = STEPS) -> dict[str, float]:
    """One cell."""
    name, seed, *task = key.split("/")
    if name != "single":
        weigh, callbacks = methods()[name]
        return run(weigh, callbacks(), int(seed), None, base, steps)
    share = SIZES[task[0].rpartition("_")[0]] / (2 * sum(SIZES.values()))
    return run("rows", [], int(seed), task[0], base, max(1, round(steps * share)))


def render(kept: dict[str, dict[str, float]]) -> str:
    """A table: mean over tasks of each kind, and the relative improvement over single tasks, over seeds."""
    from lightning_ft.functional.relative_improvement import relative_improvement

    lines = ["| method | accuracy | Pearson | relative improvement | seeds |", "| --- | --- | --- | --- | --- |"]
    whole: dict[str, dict[int, dict[str, float]]] = {}
    for key, found in kept.items():
        name, seed, *_ = key.split("/")
        whole.setdefault(name, {}).setdefault(int(seed), {}).update(found)
    single = whole.get("single", {})
    for name, seeds in whole.items():
        done = {seed: found for seed, found in seeds.items() if set(found) == set(TASKS)}
        if not done:
            continue
        columns = [
            [mean(v for k, v in found.items() if k.endswith(kind)) for found in done.values()]
            for kind in ("tone", "rating")
        ]
        gains = [relative_improvement(done[s], single[s]) for s in done if set(single.get(s, {})) == set(TASKS)]
        shown = [_shown(values) for values in (*columns, gains)]
        lines.append(f"| {name} | {' | '.join(shown)} | {len(done)} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """Runs the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    kept: dict[str, Any] = (
        json.loads(given.output.read_text()) if given.output.exists() else {"setting": SETTING, "cells": {}}
    )
    if kept["setting"] != SETTING:
        raise SystemExit(f"{given.output} was measured with {kept['setting']}; move it away.")
    for key in cells():
        if given.render or given.only not in key or key in kept["cells"]:
            continue
        kept["cells"][key] = measure(key)
        print(key, {name: round(value, 3) for name, value in kept["cells"][key].items()}, flush=True)
        given.output.write_text(json.dumps(kept, indent=1) + "\n")
    print(render(kept["cells"]))


if __name__ == "__main__":
    main()
