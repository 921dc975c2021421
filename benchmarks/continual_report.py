"""Renders what `benchmarks.continual` has kept as tables, whatever part of it is there; nothing is written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mean, pstdev
from typing import Any

Cells = Mapping[str, Any]
Grid = Mapping[str, Mapping[str, Sequence[float]]]
"""Suite -> method -> strengths that are tried; none where there is nothing to choose."""

TITLES = {
    "digits_permuted": "Permuted digits: five orders of the pixels, a net of 64-128-128-10",
    "digits_split": "Split digits: five tasks of two digits, whose classes all compete",
    "vader_minilm": "Sentiment in four domains, `starter:minilm-l6` trained in full",
    "vader_minilm_lora": "The same with LoRA, r 8",
    "vader_smollm": "The same as answers in words, `starter:smollm2-135m` with LoRA, r 8; one seed",
}
SCORES = {
    "average": "average",
    "backward_transfer": "backward",
    "forward_transfer": "forward",
    "forgetting_max": "forgetting",
}
HEADS = ("method", "strength", *SCORES.values(), "against naive", "seconds")


def strength(cells: Cells, suite: str, method: str, tried: Sequence[float]) -> float | None:
    """What a method's strength is: the one with the best average of those tried; None until all of them were.

    Args:
        cells: key -> result.
        suite: its name.
        method: its name.
        tried: strengths; empty where there is none to choose, which is 0 then.
    """
    if not tried:
        return 0.0
    found = {value: cells.get(f"{suite}|{method}|{value:g}|choose", {}) for value in tried}
    if not all("scores" in cell for cell in found.values()):
        return None
    return max(found, key=lambda value: float(found[value]["scores"]["average"]))


def scored(cells: Cells, suite: str, method: str, tried: Sequence[float]) -> dict[int, Any]:
    """Seed -> cell of a method at its chosen strength."""
    best = strength(cells, suite, method, tried)
    if best is None:
        return {}
    keys = {seed: f"{suite}|{method}|{best:g}|{seed}" for seed in range(10)}
    return {seed: cells[key] for seed, key in keys.items() if "scores" in cells.get(key, {})}


def render(kept: Mapping[str, Any], grid: Grid) -> str:
    """The whole page of results, matrices included."""
    cells, lines = kept["cells"], ["# Continual learning: what each method keeps", ""]
    if not cells:
        return "\n".join([*lines, "Nothing has been measured yet."]) + "\n"
    versions = kept["machine"]["versions"]
    lines += [
        "Means over the seeds +- their standard deviation; `against naive` is the mean over seeds of the difference in average "
        "accuracy, least and most. Strengths were chosen on rows and a seed of their own. 200 rows are kept where rows are.",
        "",
        f"torch {versions['torch']}, lightning {versions['lightning']}, transformers {versions['transformers']}.",
    ]
    for suite, methods in grid.items():
        if any(scored(cells, suite, method, tried) for method, tried in methods.items()):
            lines += ["", f"## {TITLES[suite]}", "", *table(cells, suite, methods), "", *told(cells, suite, methods)]
            lines += ["", "Mean accuracy on each task (columns) after each task (rows):"]
            for method, tried in methods.items():
                lines += _matrix(method, scored(cells, suite, method, tried))
    failed = {key: cell["failed"] for key, cell in cells.items() if "failed" in cell}
    if failed:
        lines += ["", "## Failed", "", *(f"- {key}: {why}" for key, why in failed.items())]
    return "\n".join(lines) + "\n"


def filled(page: str, kept: Mapping[str, Any], grid: Grid) -> str:
    """A page with its tables between ``<!-- measured: SUITE -->`` and ``<!-- end -->`` written anew."""

    def block(match: re.Match[str]) -> str:
        start, suite, end = match.groups()
        cells, methods = kept["cells"], grid[suite]
        if not any(scored(cells, suite, method, tried) for method, tried in methods.items()):
            return match.group(0)  # tables of an earlier time are better than none
        return "\n".join([start, *table(cells, suite, methods), "", *told(cells, suite, methods), end])

    return re.sub(r"(<!-- measured: (\w+) -->).*?(<!-- end -->)", block, page, flags=re.DOTALL)


def table(cells: Cells, suite: str, methods: Mapping[str, Sequence[float]]) -> list[str]:
    """The scalars of each method that has been scored."""
    lines = [_row(HEADS), _row("---" for _ in HEADS)]
    for method, tried in methods.items():
        found = scored(cells, suite, method, tried)
        if not found:
            continue
        values = [
            _spread([cell["scores"][name] for cell in found.values() if name in cell["scores"]]) for name in SCORES
        ]
        away = _against(cells, suite, methods, method)
        shown = f"{mean(away):+.3f} ({min(away):+.3f} to {max(away):+.3f})" if away and method != "naive" else ""
        best = strength(cells, suite, method, tried)
        seconds = mean(cell["seconds"] for cell in found.values())
        lines.append(_row((method, f"{best:g}" if tried else "", *values, shown, f"{seconds:.0f}")))
    return lines


def told(cells: Cells, suite: str, methods: Mapping[str, Sequence[float]]) -> list[str]:
    """In a sentence: which methods were better than naive with every seed, and which were not."""
    better, not_better = [], []
    for method in methods:
        away = _against(cells, suite, methods, method)
        if method not in ("naive", "joint") and away:
            (better if min(away) > 0 else not_better).append(method)
    seeds = len(scored(cells, suite, "naive", ()))
    words = f"with each of {seeds} seeds" if seeds > 1 else "with the one seed"
    parts = [f"Better than naive {words}: {', '.join(better) or 'none'}."]
    if not_better:
        parts.append(f"Not so: {', '.join(not_better)}.")
    missing = [method for method, tried in methods.items() if not scored(cells, suite, method, tried)]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    precisions: dict[str, list[str]] = {}
    for method, tried in methods.items():
        # Cells of digits that do not say ran in float32, as all of them do.
        for found in {cell.get("precision", "32-true") for cell in scored(cells, suite, method, tried).values()}:
            precisions.setdefault(found, []).append(method)
    if len(precisions) > 1:  # the machines that ran them multiply different things fast
        told = "; ".join(f"{precision}: {', '.join(some)}" for precision, some in precisions.items())
        parts.append(f"Precisions differ, {told}.")
    return [" ".join(parts)]


def _against(cells: Cells, suite: str, methods: Mapping[str, Sequence[float]], method: str) -> list[float]:
    """Seed by seed, how much higher the average is than without anything."""
    naive, own = scored(cells, suite, "naive", ()), scored(cells, suite, method, methods[method])
    return [own[s]["scores"]["average"] - naive[s]["scores"]["average"] for s in own if s in naive]


def _matrix(method: str, found: dict[int, Any]) -> list[str]:
    """The mean matrix of a method, with the scores before any task on top."""
    if not found:
        return []
    one = next(iter(found.values()))
    rows = [("before", [cell["start"] for cell in found.values()])] if one["start"] else []
    names = one["tasks"] if len(one["matrix"]) > 1 else ["all at once"]
    rows += [(f"after {name}", [cell["matrix"][n] for cell in found.values()]) for n, name in enumerate(names)]
    lines = ["", _row((method, *one["tasks"])), _row("---" for _ in range(len(one["tasks"]) + 1))]
    for name, several in rows:
        columns = zip(*several, strict=True)
        lines.append(_row((name, *("" if None in column else f"{mean(column):.3f}" for column in columns))))
    return lines


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f} +- {pstdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def _row(values: Any) -> str:
    return "| " + " | ".join(values) + " |"
