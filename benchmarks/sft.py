"""SFT with LoRA: this library against TRL + PEFT at the best of a grid of its settings, and against a bare loop.

    python -m benchmarks.sft                 # everything; takes about half an hour on two cores
    python -m benchmarks.sft --quick         # three steps, two settings: does it run?

Every run is a process of its own, one at a time. First each setting of TRL's grid is run once; then its best, this
library and the bare loop are run in turn, A B C A B C. A finished run is kept in the results file at once and skipped
the next time (``--redo NAME`` repeats those whose key contains NAME), so that an interrupted benchmark goes on where
it stopped. Leave the machine alone meanwhile: on two cores another busy process makes steps ten times slower.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.runs import RESULTS, Store, launch
from benchmarks.trl_side import CHECKPOINTED, GRID

SIDES = {"trl": "benchmarks.trl_side", "ours": "benchmarks.our_side", "plain": "benchmarks.plain_loop"}
BATCH = {"long": 8, "short": 16}
QUICK_GRID = ("bf16-base-plain-padded", "bf16-base-plain-packed-sdpa")


class Bench:
    """Runs cells, skipping those that are done."""

    def __init__(self, store: Store, workspace: Path, facts: dict[str, Any], arguments: argparse.Namespace) -> None:
        """Keep what every cell needs."""
        self.store, self.workspace, self.facts, self.arguments = store, workspace, facts, arguments

    def cell(self, key: str, side: str, options: dict[str, Any]) -> dict[str, Any]:
        """One run, or its kept result."""
        kept = self.store.get(key)
        if kept is not None and not any(word and word in key for word in self.arguments.redo):
            print(f"{key}: kept ({report.headline(kept)})", flush=True)
            return kept
        workload = key.split("|")[0]
        spec = {
            "model": self.facts["model"],
            "rows": str(self.workspace / f"{workload}.jsonl"),
            "adapter": str(self.workspace / "adapter"),
            "batch_size": BATCH[workload],
            "steps": self.arguments.steps,
            "warmup": self.arguments.warmup,
            "options": options,
        }
        print(f"{key}: ...", end="", flush=True)
        begun = time.perf_counter()
        try:
            result = launch(SIDES[side], [json.dumps(spec)])
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if "|grid|" not in key:
                raise
            # A setting that cannot run here is a result of the grid too.
            result = {"side": side, "failed": str(error).strip().splitlines()[-1][:500]}
        result["wall_seconds"] = time.perf_counter() - begun
        self.store.put(key, result)
        print(f"\r{key}: {report.headline(result)}, {result['wall_seconds']:.0f} s in all", flush=True)
        return result

    def workload(self, name: str, grid: dict[str, dict[str, Any]]) -> str:
        """The grid, then the sides in turn; returns the name of TRL's best setting."""
        speeds = {}
        for setting, options in grid.items():
            result = self.cell(f"{name}|grid|trl {setting}", "trl", options)
            if "failed" not in result:
                speeds[setting] = result["tokens_per_second"]
        if not speeds:
            raise SystemExit(f"No setting of TRL's grid ran on the workload {name}.")
        best = max(speeds, key=speeds.__getitem__)
        print(f"{name}: TRL's best setting is {best}", flush=True)
        for repeat in range(self.arguments.repeats):
            self.cell(f"{name}|turn {repeat}|trl {best}", "trl", grid[best])
            self.cell(f"{name}|turn {repeat}|ours", "ours", {})
            self.cell(f"{name}|turn {repeat}|plain", "plain", {})
        return best


def prepare(workloads: list[str], workspace: Path) -> dict[str, Any]:
    """Write the rows and the starting factors; returns what is known of them."""
    return launch("benchmarks.rows", ["--output", str(workspace), "--workloads", ",".join(workloads)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three steps, two settings, one turn; keeps nothing")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the three sides")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run, warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--workloads", default="long,short", help="which of long, short")
    parser.add_argument("--grid", default="", help="only these of TRL's settings, by name, comma-separated")
    parser.add_argument("--checkpointing", action="store_true", help="also run both sides with gradient checkpointing")
    parser.add_argument("--redo", action="append", default=[], help="repeat finished runs whose key contains this")
    parser.add_argument("--output", type=Path, default=RESULTS / "sft.json", help="results; the table lies beside it")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.warmup, arguments.repeats = 3, 1, 1
        arguments.workloads, arguments.grid = "long", arguments.grid or ",".join(QUICK_GRID)
        arguments.output = Path(tempfile.mkdtemp()) / "sft.json"
    unknown = [name for name in filter(None, arguments.grid.split(",")) if name not in GRID]
    if unknown:
        parser.error(f"no setting {', '.join(unknown)} in TRL's grid; there are {', '.join(GRID)}")
    if not 0 <= arguments.warmup < arguments.steps:
        parser.error(f"--warmup must be below --steps ({arguments.steps}), got {arguments.warmup}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the table."""
    arguments = parse(argv)
    workloads = [name for name in arguments.workloads.split(",") if name]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        facts = prepare(workloads, workspace)
        settings: dict[str, Any] = {"steps": arguments.steps, "warmup": arguments.warmup, "batch": BATCH}
        store = Store(arguments.output, settings)
        rows = store.data.setdefault("rows", {})
        if arguments.output.exists():
            rows.update(json.loads(arguments.output.read_text()).get("rows", {}))
        for name in workloads:
            digest = hashlib.sha256((workspace / f"{name}.jsonl").read_bytes()).hexdigest()
            known = rows.get(name)
            if known and known["sha256"] != digest:
                raise SystemExit(f"{arguments.output} holds runs on other rows of the workload {name}; move it away.")
            rows[name] = {**facts[name], "sha256": digest}
        bench = Bench(store, workspace, facts, arguments)
        chosen = [name for name in arguments.grid.split(",") if name] or list(GRID)
        for name in workloads:
            grid = {setting: GRID[setting] for setting in chosen}
            if name == "short" and store.get("long|turn 0|ours"):
                # The grid on short rows: one setting of each layout, at the precisions that led on long rows.
                grid = report.leaders(store.data, grid)
            bench.workload(name, grid)
            if arguments.checkpointing:
                bench.cell(f"{name}|checkpointed|trl", "trl", CHECKPOINTED)
                bench.cell(f"{name}|checkpointed|ours", "ours", {"checkpointing": True})
        table = report.render(store.data)
        arguments.output.with_suffix(".md").write_text(table, encoding="utf-8")
        print("\n" + table)
        print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
