"""Samplers, balancers and surgery against single tasks and plain mixing: eight tasks on one model, one budget.

    python -m benchmarks.multitask                         # all cells that are missing; hours on two cores, seed 0 first
    python -m benchmarks.multitask --only vader            # cells whose key contains one of these, separated by commas
    python -m benchmarks.multitask --seeds 0 --minutes 60  # these seeds; begins no cell after so long
    python -m benchmarks.multitask --render                # the tables alone, from the kept results

``vader``: each of the four VADER domains gives two tasks: a class (is the mean rating above 0?) and the rating itself, scaled to
-1 to 1; all weights of an encoder are trained. ``reasoning``: eight tasks of reasoning-gym, by LoRA on a language model. Tasks
differ in size, so that samplers have something to do.

A cell is ``suite|method|seed``; of single tasks ``suite|single|seed|task``, and these share the budget: each trains for the steps
that it would get under plain mixing. Each cell is kept when done and skipped the next time. Several processes may run at once,
on CPUs or on one GPU, with one results file: each takes a cell that no other is at. Test rows, rate and base are the same for all
cells of a suite; the seed draws heads and factors, VADER's training rows and the order of rows. Under
autocast to bfloat16 where that is fast.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import multitask_cells as cells
from benchmarks import multitask_report
from benchmarks.vader_cells import Kept, quiet

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "techniques" / "multitask.md"
TASKS = {"vader": cells.VADER, "reasoning": list(cells.QUESTIONS)}


def methods(suite: str) -> cells.Methods:
    """Those that a suite compares."""
    return cells.vader_methods() if suite == "vader" else cells.reasoning_methods()


def keys(seeds: Iterable[int] = cells.SEEDS) -> list[str]:
    """All cells in order: seed after seed, in each the single tasks first, which the others are compared with."""
    found = []
    for seed in seeds:
        for suite, tasks in TASKS.items():
            found += [f"{suite}|single|{seed}|{task}" for task in tasks]
            found += [f"{suite}|{method}|{seed}" for method in methods(suite)]
    return found


def measure(key: str, folder: Path, **options: Any) -> dict[str, Any]:
    """One cell.

    Args:
        key: which.
        folder: for its rows, and what is made of them.
        **options: ``base``, ``steps`` and ``accelerator`` in the place of the benchmark's own.
    """
    suite, method, seed, *task = key.split("|")
    make = cells.vader_cell if suite == "vader" else cells.reasoning_cell
    only = task[0] if task else None
    return make("plain" if method == "single" else method, int(seed), only, folder, **options)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multitask", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--seeds", default=",".join(map(str, cells.SEEDS)), help="which, separated by commas")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="where it runs")
    parser.add_argument("--render", action="store_true", help="write the tables from the kept results and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "multitask.json")
    given = parser.parse_args(argv)
    kept = Kept(given.output, cells.SETTING, given.only)
    if kept.content.get("setting", cells.SETTING) != cells.SETTING:
        raise SystemExit(f"{given.output} was measured with {kept.content['setting']}; move it away.")
    if not given.render:
        quiet()
        end = time.monotonic() + 60 * given.minutes
        with tempfile.TemporaryDirectory() as place:
            for key in keys(int(seed) for seed in given.seeds.split(",")):

                def cell(key: str = key) -> dict[str, Any]:
                    return measure(key, Path(place), accelerator=given.accelerator)

                if time.monotonic() < end:
                    kept.ensure(key, cell, "mean")
    table = given.output.with_suffix(".md")
    table.write_text(multitask_report.render(kept.content), encoding="utf-8")
    print(f"Written to {given.output} and {table}.")
    if given.output == RESULTS / "multitask.json" and PAGE.exists():
        PAGE.write_text(multitask_report.filled(PAGE.read_text(encoding="utf-8"), kept.content), encoding="utf-8")


if __name__ == "__main__":
    main()
