"""Full training against training few parameters: one encoder, one data set, one budget, several methods and rates.

    python -m benchmarks.supervised                    # all cells that are missing; about an hour on two cores
    python -m benchmarks.supervised --only regression  # cells whose key contains this
    python -m benchmarks.supervised --render           # the table alone, from the kept results

A cell is (task, method, rate, seed). Each is kept when it is done and skipped the next time. The rate of each method is
chosen among three by its score on validation rows with seed 0; two more seeds run at that rate; only test rows are
reported. The data set, its split and the order of rows are the same for all; the seed draws the head and the factors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.vader_cells import (
    BATCH,
    HEAD_LR,
    SEEDS,
    STEPS,
    TASKS,
    TEST,
    TRAIN,
    VAL,
    Kept,
    best_rate,
    encoder_cell,
    quiet,
    write_rows,
)
from lightning_ft.functional.intervals import mean_interval

OUTPUT = Path(__file__).resolve().parent / "results" / "supervised.json"
SETTING = {"train": TRAIN, "val": VAL, "test": TEST, "steps": STEPS, "batch": BATCH, "head_lr": HEAD_LR}
RATES = {
    "full": (1e-4, 2e-4, 4e-4),
    "frozen body": (3e-3, 1e-2, 3e-2),
    "BitFit": (2e-3, 5e-3, 1e-2),
    "gradual": (1e-4, 2e-4, 4e-4),
    "LoRA": (5e-4, 2e-3, 5e-3),
    "DoRA": (5e-4, 2e-3, 5e-3),
}


def techniques() -> dict[str, Callable[[], list[Any]]]:
    """Method -> its callbacks, made anew for each run."""
    from lightning_ft import Freeze, GradualUnfreezing, LoRA

    return {
        "full": lambda: [],
        "frozen body": lambda: [Freeze(["head"])],
        "BitFit": lambda: [Freeze(["biases", "head"])],
        # Half of the run thaws a part every 4 steps: the head, six blocks, the embeddings.
        "gradual": lambda: [GradualUnfreezing(4, unit="step")],
        "LoRA": lambda: [LoRA(8)],
        "DoRA": lambda: [LoRA(8, dora=True)],
    }


def keys(task: str, method: str, seed: int = SEEDS[0]) -> dict[float, str]:
    """Rate -> key of its cell."""
    return {rate: f"{task}|{method}|{rate:g}|{seed}" for rate in RATES[method]}


def run(only: str) -> None:
    """Every missing cell: the grid of rates with the first seed, then the other seeds at the best rate."""
    kept = Kept(OUTPUT, SETTING, only)
    with tempfile.TemporaryDirectory() as name:
        files = write_rows(Path(name))

        def ensure(task: str, method: str, rate: float, seed: int) -> None:
            kept.ensure(
                keys(task, method, seed)[rate],
                lambda: encoder_cell(task, techniques()[method](), rate, seed, files, Path(name)),
                TASKS[task],
            )

        for task in TASKS:
            for method, rates in RATES.items():
                for rate in rates:
                    ensure(task, method, rate, SEEDS[0])
                best = best_rate(kept.cells, keys(task, method), TASKS[task])
                for seed in SEEDS[1:] if best is not None else ():
                    ensure(task, method, best, seed)  # type: ignore[arg-type]


def render() -> str:
    """The table of what is kept."""
    kept = json.loads(OUTPUT.read_text())
    setting, versions = kept["setting"], kept["machine"]["versions"]
    lines = [
        "# Full training against training few parameters",
        "",
        f"`starter:minilm-l6` (22.7 M parameters, of which 11.7 M are embeddings) on VADER's clearly rated sentences of "
        f"three domains: {setting['train']} train, {setting['val']} validation, {setting['test']} test rows; "
        f"{setting['steps']} steps of {setting['batch']} rows for every method; the new head at {setting['head_lr']:g} or the "
        "method's rate, whichever is higher. Rate: the best of three on validation rows with seed 0. Scores on test rows: mean "
        "of three seeds with Student's 95 % interval (three seeds make it wide).",
        "",
        f"{kept['machine']['cpu']}, {kept['machine']['cores']} cores; torch {versions['torch']}, lightning "
        f"{versions['lightning']}, transformers {versions['transformers']}. One thread; other processes ran beside it, so that "
        "seconds are not compared.",
    ]
    for task, score in TASKS.items():
        name = score.replace("val/", "")
        lines += ["", f"## {task.capitalize()}", "", f"| method | trained | rate | test {name} | 95 % | seeds |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for method in RATES:
            rate = best_rate(kept["cells"], keys(task, method), score)
            if rate is None:
                continue
            cells = [kept["cells"].get(f"{task}|{method}|{rate:g}|{seed}") for seed in SEEDS]
            done = [one for one in cells if one and "scores" in one]
            values = [one["scores"][score.replace("val/", "test/")] for one in done]
            low, high = mean_interval(values) if len(values) > 1 else (float("nan"), float("nan"))
            trained = f"{done[0]['trainable']:,}"
            lines.append(
                f"| {method} | {trained} | {rate:g} | {mean(values):.3f} | {low:.3f} to {high:.3f} | "
                f"{', '.join(f'{value:.3f}' for value in values)} |"
            )
        lines += ["", "Validation scores of the grid (seed 0):", "", "| method | rate: score |", "| --- | --- |"]
        for method, rates in RATES.items():
            found = {r: kept["cells"].get(f"{task}|{method}|{r:g}|{SEEDS[0]}") for r in rates}
            shown = ", ".join(
                f"{r:g}: {one['scores'][score]:.3f}" for r, one in found.items() if one and "scores" in one
            )
            lines.append(f"| {method} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supervised", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only cells whose key contains this")
    parser.add_argument("--render", action="store_true", help="write the table from the kept results and run nothing")
    arguments = parser.parse_args()
    if not arguments.render:
        quiet()
        run(arguments.only)
    OUTPUT.with_suffix(".md").write_text(render(), encoding="utf-8")
    print(f"Written to {OUTPUT} and {OUTPUT.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
