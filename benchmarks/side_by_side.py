"""TRL + PEFT beside this library: every setting of a grid once, then its best and this library in turn, each a process of its own.

A finished run is kept and skipped the next time, so that a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Run
from benchmarks.runs import Store, launch

QUICK = "bf16-base-plain"
"""The setting that ``--quick`` runs."""


@dataclass(frozen=True)
class Comparison:
    """What tells one benchmark from another.

    Attributes:
        title: of its page.
        sides: ``trl`` and ``ours`` -> the module that is run.
        grid: setting of TRL -> its options.
        head: the first two lines of its tables.
        spec: (workload, options, facts of all workloads, arguments) -> what a side is told beside the model, its adapter and
            rows, see `benchmarks.measure.Spec`.
        finish: adds to a run what it is judged by.
        score: of a run; TRL's best setting has the greatest.
        told: a run in a few words, without its memory.
        intro: (data, workload) -> a paragraph about it.
        ratios: (data, workload, turns) -> lines of a list about this library beside TRL.
        line: (name, run, data, workload) -> a run as a table row.
    """

    title: str
    sides: dict[str, str]
    grid: dict[str, dict[str, Any]]
    head: str
    spec: Callable[[str, dict[str, Any], dict[str, Any], argparse.Namespace], dict[str, Any]]
    finish: Callable[[Run, str], None]
    score: Callable[[Run], float]
    told: Callable[[Run], str]
    intro: Callable[[dict[str, Any], str], str]
    ratios: Callable[[dict[str, Any], str, list[dict[str, Run]]], list[str]]
    line: Callable[[str, Run, dict[str, Any], str], str]


class Bench:
    """Runs cells, skipping those that are done."""

    def __init__(
        self, what: Comparison, store: Store, workspace: Path, facts: dict[str, Any], arguments: argparse.Namespace
    ) -> None:
        """Keep what every cell needs."""
        self.what, self.store, self.workspace, self.facts, self.arguments = what, store, workspace, facts, arguments

    def cell(self, key: str, side: str, options: dict[str, Any]) -> Run:
        """One run, or its kept result; a setting of the grid that cannot run is kept with its reason."""
        kept = self.store.get(key)
        if kept is not None:
            return kept
        workload = key.split("|")[0]
        spec = {
            "model": self.facts["model"],
            "rows": str(self.workspace / f"{workload}.jsonl"),
            "adapter": str(self.workspace / "adapter"),
            **self.what.spec(workload, options, self.facts, self.arguments),
        }
        print(f"{key}: ...", end="", flush=True)
        begun = time.perf_counter()
        try:
            result = launch(self.what.sides[side], [json.dumps(spec)])
            self.what.finish(result, workload)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if "|grid|" not in key:
                raise
            result = {"side": side, "failed": str(error).strip().splitlines()[-1][:500]}
        result["wall_seconds"] = time.perf_counter() - begun
        self.store.put(key, result)
        print(f"\r{key}: {self.headline(result)}, {result['wall_seconds']:.0f} s in all", flush=True)
        return result

    def headline(self, run: Run) -> str:
        """One run in a few words."""
        if "failed" in run:
            return f"could not run: {run['failed'][:120]}"
        return f"{self.what.told(run)}, {run['peak_memory_bytes'] / 1e9:.2f} GB"

    def workload(self, name: str, grid: dict[str, dict[str, Any]]) -> None:
        """The grid, then the sides in turn."""
        found = {setting: self.cell(f"{name}|grid|trl {setting}", "trl", options) for setting, options in grid.items()}
        scores = {setting: self.what.score(run) for setting, run in found.items() if "failed" not in run}
        if not scores:
            raise SystemExit(f"No setting of TRL's grid ran on the workload {name}.")
        best = max(scores, key=scores.__getitem__)
        print(f"{name}: TRL's best setting is {best}", flush=True)
        for repeat in range(self.arguments.repeats):
            self.cell(f"{name}|turn {repeat}|trl {best}", "trl", grid[best])
            self.cell(f"{name}|turn {repeat}|ours", "ours", {})
        self.cell(f"{name}|apart|ours, a prompt for each answer", "ours", {"share_prompts": False})


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
        arguments: ``workloads``, ``output``, ``quick``, ``repeats``, and what ``what.spec`` looks at.
        settings: what all runs of a file have in common.
    """
    workloads = [name for name in arguments.workloads.split(",") if name]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        facts = launch("benchmarks.pairs", ["--output", folder, "--workloads", ",".join(workloads)])
        store = Store(arguments.output, settings)
        rows = store.data.setdefault("rows", {})
        if arguments.output.exists():
            rows.update(json.loads(arguments.output.read_text()).get("rows", {}))
        for name in workloads:
            digest = hashlib.sha256((workspace / f"{name}.jsonl").read_bytes()).hexdigest()
            if rows.get(name, {}).get("sha256", digest) != digest:
                raise SystemExit(f"{arguments.output} holds runs on other pairs of the workload {name}; move it away.")
            rows[name] = {**facts[name], "sha256": digest}
        bench = Bench(what, store, workspace, facts, arguments)
        grid = {QUICK: what.grid[QUICK]} if arguments.quick else what.grid
        for name in workloads:
            bench.workload(name, grid)
        table = render(what, store.data)
        arguments.output.with_suffix(".md").write_text(table, encoding="utf-8")
        print("\n" + table)
        print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")


__all__ = ["Bench", "Comparison", "compare", "render"]
