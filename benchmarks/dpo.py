"""DPO with LoRA: this library against TRL's DPOTrainer + PEFT at the best of a grid of its settings.

    python -m benchmarks.dpo                 # everything; 90 minutes on two cores, 45 with --steps 3 --warmup 1 --repeats 3
    python -m benchmarks.dpo --quick         # three steps, one setting: does it run?

As in `benchmarks.sft`: every run is a process of its own, each setting of the grid once, then its best and this library in turn; a
finished run is kept and skipped the next time. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.dpo_trl import GRID
from benchmarks.runs import RESULTS, Store, launch

SIDES = {"trl": "benchmarks.dpo_trl", "ours": "benchmarks.dpo_ours"}
BATCH = {"long": 4, "short": 8}
BARS = {"speed": (2.5, 3.0), "memory": (0.5, 0.4)}
"""On long prompts: what must be reached, and what is aimed at."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three steps, one setting, one turn; keeps nothing")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the two sides")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run, warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--workloads", default="long,short", help="which of long, short")
    parser.add_argument("--output", type=Path, default=RESULTS / "dpo.json", help="results; the table lies beside it")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.warmup, arguments.repeats, arguments.workloads = 3, 1, 1, "long"
        arguments.output = Path(tempfile.mkdtemp()) / "dpo.json"
    return arguments


class Bench:
    """Runs cells, skipping those that are done."""

    def __init__(self, store: Store, workspace: Path, facts: dict[str, Any], arguments: argparse.Namespace) -> None:
        """Keep what every cell needs."""
        self.store, self.workspace, self.facts, self.arguments = store, workspace, facts, arguments

    def cell(self, key: str, side: str, options: dict[str, Any]) -> dict[str, Any]:
        """One run, or its kept result."""
        kept = self.store.get(key)
        if kept is not None:
            return kept
        workload = key.split("|")[0]
        spec = {
            "model": self.facts["model"],
            "rows": str(self.workspace / f"{workload}.jsonl"),
            "adapter": str(self.workspace / "adapter"),
            "batch_size": BATCH[workload],
            "steps": self.arguments.steps,
            "warmup": self.arguments.warmup,
            "options": {**options, "tokens": self.facts[workload]["tokens"]},
        }
        print(f"{key}: ...", end="", flush=True)
        begun = time.perf_counter()
        try:
            result = launch(SIDES[side], [json.dumps(spec)])
            timed = result["step_seconds"][result["warmup"] :]
            result["pairs_per_second"] = BATCH[workload] * len(timed) / sum(timed)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if "|grid|" not in key:
                raise
            result = {"side": side, "failed": str(error).strip().splitlines()[-1][:500]}
        result["wall_seconds"] = time.perf_counter() - begun
        self.store.put(key, result)
        print(f"\r{key}: {headline(result)}, {result['wall_seconds']:.0f} s in all", flush=True)
        return result

    def workload(self, name: str, grid: dict[str, dict[str, Any]]) -> None:
        """The grid, then the sides in turn."""
        found = {setting: self.cell(f"{name}|grid|trl {setting}", "trl", options) for setting, options in grid.items()}
        speeds = {setting: run["pairs_per_second"] for setting, run in found.items() if "failed" not in run}
        if not speeds:
            raise SystemExit(f"No setting of TRL's grid ran on the workload {name}.")
        best = max(speeds, key=speeds.__getitem__)
        print(f"{name}: TRL's best setting is {best}", flush=True)
        for repeat in range(self.arguments.repeats):
            self.cell(f"{name}|turn {repeat}|trl {best}", "trl", grid[best])
            self.cell(f"{name}|turn {repeat}|ours", "ours", {})
        self.cell(f"{name}|apart|ours, a prompt for each answer", "ours", {"share_prompts": False})


def headline(run: dict[str, Any]) -> str:
    """One run in a few words."""
    if "failed" in run:
        return f"could not run: {run['failed'][:120]}"
    return f"{run['pairs_per_second']:.2f} pairs/s, {run['peak_memory_bytes'] / 1e9:.2f} GB"


def turns(data: dict[str, Any], workload: str) -> list[dict[str, Any]]:
    """The runs of each complete turn by side."""
    found: dict[int, dict[str, Any]] = {}
    for key, run in data["runs"].items():
        name, phase, side = key.split("|")
        if name == workload and phase.startswith("turn "):
            found.setdefault(int(phase.split()[1]), {})[side.split()[0]] = {**run, "setting": side.partition(" ")[2]}
    return [found[n] for n in sorted(found) if SIDES.keys() <= found[n].keys()]


def line(name: str, run: dict[str, Any], gflop: float) -> str:
    """One run as a table row."""
    if "failed" in run:
        return f"| {name} | could not run | | | | |"
    seconds = median(run["step_seconds"][run["warmup"] :])
    share = 100 * run["pairs_per_second"] * gflop / max(run["matmul_gflops"].values())
    return (
        f"| {name} | {run['pairs_per_second']:.2f} | {run['peak_memory_bytes'] / 1e9:.2f} | {seconds:.2f} | {share:.0f} % "
        f"| {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f} |"
    )


def section(data: dict[str, Any], name: str) -> list[str]:
    """Everything about one workload."""
    facts, pairs = data["rows"][name], turns(data, name)
    gflop = facts["useful_gflop_per_pair"]
    head = "| run | pairs/s | peak GB | s/step | share of peak | loss, first -> last |\n|---|---|---|---|---|---|"
    out = [
        f"## Workload `{name}`",
        f"{facts['pairs']} pairs, a prompt of {facts['prompt_tokens']:.0f} tokens and answers of {facts['answer_tokens']:.0f} on "
        f"average (longest row {facts['longest']}); {BATCH[name]} pairs a step, {data['settings']['steps']} steps, the first "
        f"{data['settings']['warmup']} not timed; {gflop:.0f} GFLOP of matrix products a pair at least, its prompt once.",
        "",
    ]
    if pairs:
        ratios = {w: [p["ours"][w] / p["trl"][w] for p in pairs] for w in ("pairs_per_second", "peak_memory_bytes")}
        gaps = [abs(a - b) for p in pairs[:1] for a, b in zip(p["ours"]["losses"], p["trl"]["losses"], strict=True)]
        peers = [run for key, run in data["runs"].items() if key.startswith(f"{name}|grid|") and "failed" not in run]
        apart = max(max(step) - min(step) for step in zip(*(run["losses"] for run in peers), strict=True))
        least = min(run["peak_memory_bytes"] for run in peers)
        leanest = [p["ours"]["peak_memory_bytes"] / least for p in pairs]
        told = f" (bar {BARS['speed'][0]}, aim {BARS['speed'][1]})" if name == "long" else ""
        held = f" (bar {BARS['memory'][0]}, aim {BARS['memory'][1]})" if name == "long" else ""
        out += [
            f"**Against TRL + PEFT at its best setting, `{pairs[0]['trl']['setting']}`** ({len(pairs)} turns; median with least "
            "and greatest)",
            "",
            f"- speed: {report.spread(ratios['pairs_per_second'])} x{told}",
            f"- peak memory: {report.spread(ratios['peak_memory_bytes'])} x{held}; {report.spread(leanest)} x the setting of "
            f"TRL's that takes least, {least / 1e9:.2f} GB",
            f"- loss curves: largest difference {max(gaps):.4f} nats over {len(gaps)} steps of the same pairs; TRL's own "
            f"settings, fp32 among them, lie up to {apart:.4f} apart",
            "",
            head,
        ]
        for number, turn in enumerate(pairs):
            out += [line(f"{number}: TRL", turn["trl"], gflop), line(f"{number}: ours", turn["ours"], gflop)]
    rest = {key: run for key, run in data["runs"].items() if key.startswith((f"{name}|grid|", f"{name}|apart|"))}
    out += ["", "One run each:", "", head, *(line(key.split("|")[2], run, gflop) for key, run in rest.items()), ""]
    return out


def render(data: dict[str, Any]) -> str:
    """The whole page."""
    machine = data["machine"]
    out = [
        "# DPO with LoRA: speed and memory",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}).",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + ".",
        "",
    ]
    for name in data["rows"]:
        if any(key.startswith(f"{name}|") for key in data["runs"]):
            out += section(data, name)
    return "\n".join(out).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the table."""
    arguments = parse(argv)
    workloads = [name for name in arguments.workloads.split(",") if name]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        facts = launch("benchmarks.pairs", ["--output", folder, "--workloads", ",".join(workloads)])
        store = Store(
            arguments.output, {"steps": arguments.steps, "warmup": arguments.warmup, "batch": BATCH, "beta": 0.1}
        )
        rows = store.data.setdefault("rows", {})
        if arguments.output.exists():
            rows.update(json.loads(arguments.output.read_text()).get("rows", {}))
        for name in workloads:
            digest = hashlib.sha256((workspace / f"{name}.jsonl").read_bytes()).hexdigest()
            if rows.get(name, {}).get("sha256", digest) != digest:
                raise SystemExit(f"{arguments.output} holds runs on other pairs of the workload {name}; move it away.")
            rows[name] = {**facts[name], "sha256": digest}
        bench = Bench(store, workspace, facts, arguments)
        grid = {"bf16-base-plain": GRID["bf16-base-plain"]} if arguments.quick else GRID
        for name in workloads:
            bench.workload(name, grid)
        table = render(store.data)
        arguments.output.with_suffix(".md").write_text(table, encoding="utf-8")
        print("\n" + table)
        print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
