"""The driver of what is measured beside TRL: every setting of its grid once, then its best and the other sides in turn.

Each run is a process of its own, one at a time. A finished one is kept and skipped the next time, so that a benchmark that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Run
from benchmarks.runs import Store, launch


@dataclass(frozen=True, kw_only=True)
class Match:
    """Who is measured, and on what.

    Attributes:
        sides: name -> the module that is run; ``trl`` plays with its best setting, the others with their defaults.
        grid: setting of TRL -> its options.
        rows: the module that writes the workloads and the factors that all begin from, and tells what is known of them.
        spec: (workload, options, facts of all workloads, arguments) -> what a side is told beside the model, its adapter and
            rows, see `benchmarks.measure.Spec`.
        finish: adds to a run of a workload what it is judged by.
        score: of a run; TRL's best setting has the greatest.
        told: a run in a few words, without its memory.
    """

    sides: dict[str, str]
    grid: dict[str, dict[str, Any]]
    rows: str
    spec: Callable[[str, dict[str, Any], dict[str, Any], argparse.Namespace], dict[str, Any]]
    score: Callable[[Run], float]
    told: Callable[[Run], str]
    finish: Callable[[Run, str], None] = lambda run, workload: None


class Bench:
    """Runs cells, skipping those that are done."""

    def __init__(
        self, what: Match, store: Store, workspace: Path, facts: dict[str, Any], arguments: argparse.Namespace
    ) -> None:
        """Keep what every cell needs."""
        self.what, self.store, self.workspace, self.facts, self.arguments = what, store, workspace, facts, arguments
        self.redo: list[str] = getattr(arguments, "redo", [])

    def cell(self, key: str, side: str, options: dict[str, Any]) -> Run:
        """One run, or its kept result; a setting of the grid that cannot run is a result too, kept with its reason."""
        kept = self.store.get(key)
        if kept is not None and not any(word and word in key for word in self.redo):
            print(f"{key}: kept ({self.headline(kept)})", flush=True)
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

    def workload(self, name: str, grid: Mapping[str, dict[str, Any]]) -> None:
        """The grid, then the sides in turn."""
        found = {setting: self.cell(f"{name}|grid|trl {setting}", "trl", options) for setting, options in grid.items()}
        scores = {setting: self.what.score(run) for setting, run in found.items() if "failed" not in run}
        if not scores:
            raise SystemExit(f"No setting of TRL's grid ran on the workload {name}.")
        best = max(scores, key=scores.__getitem__)
        print(f"{name}: TRL's best setting is {best}", flush=True)
        for repeat in range(self.arguments.repeats):
            for side in self.what.sides:
                setting, options = (f"trl {best}", grid[best]) if side == "trl" else (side, {})
                self.cell(f"{name}|turn {repeat}|{setting}", side, options)


def play(
    what: Match,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    page: Callable[[dict[str, Any]], str],
    *,
    grid_of: Callable[[str, dict[str, Any]], Mapping[str, dict[str, Any]]],
    apart: Mapping[str, tuple[str, dict[str, Any]]],
) -> None:
    """Runs what is missing of the workloads that are asked for, and writes the page beside the results.

    Args:
        what: who and on what.
        arguments: ``workloads``, ``output``, ``repeats``, and what ``what.spec`` looks at; ``redo``: parts of keys of kept runs
            that are repeated.
        settings: what all runs of a file have in common.
        page: renders all data.
        grid_of: (workload, all data) -> the part of the grid that is tried on it.
        apart: rest of a key -> side and options of a run outside the turns, on each workload.
    """
    workloads = [name for name in arguments.workloads.split(",") if name]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        facts = launch(what.rows, ["--output", folder, "--workloads", ",".join(workloads)])
        store = Store(arguments.output, settings)
        rows = store.data.setdefault("rows", {})
        if arguments.output.exists():
            rows.update(json.loads(arguments.output.read_text()).get("rows", {}))
        for name in workloads:
            digest = hashlib.sha256((workspace / f"{name}.jsonl").read_bytes()).hexdigest()
            if rows.get(name, {}).get("sha256", digest) != digest:
                raise SystemExit(f"{arguments.output} holds runs on other rows of the workload {name}; move it away.")
            rows[name] = {**facts[name], "sha256": digest}
        bench = Bench(what, store, workspace, facts, arguments)
        for name in workloads:
            bench.workload(name, grid_of(name, store.data))
            for key, (side, options) in apart.items():
                bench.cell(f"{name}|{key}", side, options)
        table = page(store.data)
        arguments.output.with_suffix(".md").write_text(table, encoding="utf-8")
        print("\n" + table)
        print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")


__all__ = ["Bench", "Match", "play"]
