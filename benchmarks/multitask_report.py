"""The tables of `benchmarks.multitask`, from its kept cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks import multitask_cells as cells
from lightning_ft.functional.intervals import mean_interval
from lightning_ft.functional.relative_improvement import relative_improvement

Found = dict[str, dict[int, dict[str, Any]]]
"""Method -> seed -> ``scores`` and ``losses`` by task, of seeds that have all tasks."""
_SIZES, _ASKED = ", ".join(map(str, cells.SIZES.values())), [n for n, _ in cells.QUESTIONS.values()]
INTRODUCTIONS = {
    "vader": (
        f"Four VADER domains with two tasks each on `starter:minilm-l6`, all weights trained: {cells.STEPS} steps of "
        f"{cells.BATCH} rows for every method, {_SIZES} sentences a domain to learn, {cells.TEST} of each to be tested by. "
        f"Single tasks share that budget. Mean of seeds with Student's 95 % interval; delta m is the mean over tasks of "
        f"(M - B) / |B| against the single task of the same seed, and the last but one column the same against plain mixing."
    ),
    "reasoning": (
        f"Eight tasks of reasoning-gym on `starter:smollm2-135m` with LoRA of rank {cells.RANK}: {cells.ASKED_STEPS} steps of "
        f"{cells.ASKED_BATCH} rows for every method, at most {min(_ASKED)} to {max(_ASKED)} questions a task to learn, "
        f"{cells.ASKED_TEST} of each to be tested by. Single tasks share that budget. Solved: the task's own check of the most "
        f"likely answer; nats: of a token of the right answer, by which delta m is taken (some tasks are never solved)."
    ),
}


def suite(kept: dict[str, Any], name: str) -> Found:
    """What was measured of a suite."""
    tasks = {"vader": cells.VADER, "reasoning": list(cells.QUESTIONS)}[name]
    whole: Found = {}
    for key, cell in kept["cells"].items():
        of, method, seed, *_ = key.split("|")
        if of == name and "scores" in cell:
            place = whole.setdefault(method, {}).setdefault(int(seed), {"scores": {}, "losses": {}, "seconds": 0.0})
            place["scores"] |= {k: v for k, v in cell["scores"].items() if k in tasks}
            place["losses"] |= cell.get("losses", {})
            place["seconds"] += cell["seconds"]
    done = {
        m: {s: one for s, one in sorted(seeds.items()) if set(one["scores"]) == set(tasks)}
        for m, seeds in whole.items()
    }
    return {method: seeds for method, seeds in done.items() if seeds}


def table(kept: dict[str, Any], name: str) -> list[str]:
    """Lines of a suite's table; none where nothing is whole."""
    found = suite(kept, name)
    if not found:
        return []
    kinds = {"accuracy": "_tone", "Pearson": "_rating"} if name == "vader" else {"solved": ""}
    columns = [*kinds, *(["nats"] if name == "reasoning" else []), "delta m", "against plain", "seeds"]
    lines = [f"| method | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for method, seeds in found.items():
        parts = [
            [_mean([v for k, v in one["scores"].items() if k.endswith(end)]) for one in seeds.values()]
            for end in kinds.values()
        ]
        if name == "reasoning":
            parts.append([_mean(list(one["losses"].values())) for one in seeds.values()])
        shown = [_shown(values) for values in parts]
        for other in ("single", "plain"):
            gains = [_gain(seeds[s], found.get(other, {})[s], name) for s in seeds if s in found.get(other, {})]
            shown.append("" if method == other else _shown(gains, sign="+", share=True))
        lines.append(f"| {method} | {' | '.join(shown)} | {len(seeds)} |")
    return lines


def task_table(kept: dict[str, Any], name: str) -> list[str]:
    """Each task's measure, mean over seeds, by method."""
    found = suite(kept, name)
    if not found:
        return []
    tasks = list(next(iter(next(iter(found.values())).values()))["scores"])
    lines = [f"| method | {' | '.join(tasks)} |", "| --- " * (len(tasks) + 1) + "|"]
    for method, seeds in found.items():
        means = [f"{_mean([one['scores'][task] for one in seeds.values()]):.3f}" for task in tasks]
        lines.append(f"| {method} | {' | '.join(means)} |")
    return lines


def render(kept: dict[str, Any]) -> str:
    """Both suites, with each task's measure, and where they were measured."""
    lines = ["# Several tasks on one model", ""]
    for name, introduction in INTRODUCTIONS.items():
        if shown := table(kept, name):
            lines += [introduction, "", *shown, "", *task_table(kept, name), ""]
    where = sorted({cell["device"] for cell in kept["cells"].values() if "device" in cell})
    if where:
        versions = ", ".join(f"{k} {v}" for k, v in kept.get("machine", {}).get("versions", {}).items())
        lines += [f"Measured on {' and '.join(where)}; {versions}."]
    failed = [f"- {key}: {cell['failed']}" for key, cell in kept["cells"].items() if "failed" in cell]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def filled(page: str, kept: dict[str, Any]) -> str:
    """A page with what stands between ``<!-- measured: vader -->`` (``reasoning``) and ``<!-- end -->`` written anew."""

    def block(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        shown = table(kept, name)
        return "\n".join([start, "", INTRODUCTIONS[name], "", *shown, "", end]) if shown else f"{start}\n{end}"

    return re.sub(r"(<!-- measured: (vader|reasoning) -->).*?(<!-- end -->)", block, page, flags=re.DOTALL)


def _gain(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    if name == "vader":
        return relative_improvement(ours["scores"], theirs["scores"])
    return relative_improvement(ours["losses"], theirs["losses"], frozenset(theirs["losses"]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(values: Sequence[float], sign: str = "", *, share: bool = False) -> str:
    if not values:
        return ""
    factor, form, unit = (100.0, ".1f", " %") if share else (1.0, ".3f", "")
    middle = format(factor * _mean(values), sign + form)
    if len(values) < 2:
        return middle + unit
    low, high = mean_interval(values)
    return f"{middle} ± {format(factor * (high - low) / 2, form)}{unit}"
