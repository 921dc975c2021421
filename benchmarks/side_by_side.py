"""TRL + PEFT beside this library where answers are compared or written: what `benchmarks.turns` runs, and the page of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import report
from benchmarks.report import Run
from benchmarks.turns import Match, play

QUICK = "bf16-base-plain"
"""The setting that ``--quick`` runs."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Match):
    """What tells one benchmark from another.

    Attributes:
        title: of its page.
        head: the first two lines of its tables.
        intro: (data, workload) -> a paragraph about it.
        ratios: (data, workload, turns) -> lines of a list about this library beside TRL.
        line: (name, run, data, workload) -> a run as a table row.
    """

    title: str
    head: str
    intro: Callable[[dict[str, Any], str], str]
    ratios: Callable[[dict[str, Any], str, list[dict[str, Run]]], list[str]]
    line: Callable[[str, Run, dict[str, Any], str], str]
    rows: str = "benchmarks.pairs"


def section(what: Comparison, data: dict[str, Any], name: str) -> list[str]:
    """Everything about one workload."""
    pairs = report.turns(data, name, what.sides)
    out = [f"## Workload `{name}`", "", what.intro(data, name), ""]
    if pairs:
        best, told = pairs[0]["trl"]["setting"], f"({len(pairs)} turns; median with least and greatest)"
        out += [f"**Against TRL + PEFT at its best setting, `{best}`** {told}", "", *what.ratios(data, name, pairs)]
        out += ["", what.head]
        for number, turn in enumerate(pairs):
            out += [what.line(f"{number}: {words}", turn[side], data, name) for side, words in _SAID.items()]
    rest = {key: run for key, run in data["runs"].items() if key.startswith((f"{name}|grid|", f"{name}|apart|"))}
    lines = [what.line(key.split("|")[2], run, data, name) for key, run in rest.items()]
    return [*out, "", "One run each:", "", what.head, *lines, ""]


_SAID = {"trl": "TRL", "ours": "ours"}


def render(what: Comparison, data: dict[str, Any]) -> str:
    """The whole page."""
    machine = data["machine"]
    out = [
        f"# {what.title}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}).",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + ".",
        "",
    ]
    for name in data["rows"]:
        if any(key.startswith(f"{name}|") for key in data["runs"]):
            out += section(what, data, name)
    return "\n".join(out).rstrip() + "\n"


def compare(what: Comparison, arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Runs what is missing of the workloads that are asked for, and writes the page beside the results.

    Args:
        what: the benchmark.
        arguments: ``quick``, and what `benchmarks.turns.play` looks at.
        settings: what all runs of a file have in common.
    """
    grid = {QUICK: what.grid[QUICK]} if arguments.quick else what.grid
    apart = {"apart|ours, a prompt for each answer": ("ours", {"share_prompts": False})}
    play(what, arguments, settings, partial(render, what), grid_of=lambda name, data: grid, apart=apart)


__all__ = ["Comparison", "compare", "render"]
