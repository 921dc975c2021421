"""DPO with LoRA: this library against TRL's DPOTrainer + PEFT at the best of a grid of its settings.

    python -m benchmarks.dpo                 # everything; 90 minutes on two cores, 45 with --steps 3 --warmup 1 --repeats 3
    python -m benchmarks.dpo --quick         # three steps, one setting: does it run?

See `benchmarks.side_by_side`. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.dpo_trl import GRID
from benchmarks.report import Run
from benchmarks.runs import RESULTS
from benchmarks.side_by_side import Comparison, compare

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


def spec(
    workload: str, options: dict[str, Any], facts: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a side is told."""
    return {
        "batch_size": BATCH[workload],
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "options": {**options, "tokens": facts[workload]["tokens"]},
    }


def finish(run: Run, workload: str) -> None:
    """Adds its speed."""
    timed = run["step_seconds"][run["warmup"] :]
    run["pairs_per_second"] = BATCH[workload] * len(timed) / sum(timed)


def intro(data: dict[str, Any], name: str) -> str:
    """What the rows are, and how much is run."""
    facts, settings = data["rows"][name], data["settings"]
    return (
        f"{facts['pairs']} pairs, a prompt of {facts['prompt_tokens']:.0f} tokens and answers of {facts['answer_tokens']:.0f} on "
        f"average (longest row {facts['longest']}); {BATCH[name]} pairs a step, {settings['steps']} steps, the first "
        f"{settings['warmup']} not timed; {facts['useful_gflop_per_pair']:.0f} GFLOP of matrix products a pair at least, its "
        "prompt once."
    )


def ratios(data: dict[str, Any], name: str, pairs: list[dict[str, Run]]) -> list[str]:
    """Speed, memory and loss curves beside TRL's."""
    speed, memory = (report.ratios(pairs, "ours", "trl", what) for what in ("pairs_per_second", "peak_memory_bytes"))
    peers = [run for key, run in data["runs"].items() if key.startswith(f"{name}|grid|") and "failed" not in run]
    least = min(run["peak_memory_bytes"] for run in peers)
    leanest = [pair["ours"]["peak_memory_bytes"] / least for pair in pairs]
    gaps = [abs(a - b) for a, b in zip(pairs[0]["ours"]["losses"], pairs[0]["trl"]["losses"], strict=True)]
    apart = max(max(step) - min(step) for step in zip(*(run["losses"] for run in peers), strict=True))
    told = {what: f" (bar {bar}, aim {aim})" if name == "long" else "" for what, (bar, aim) in BARS.items()}
    return [
        f"- speed: {report.spread(speed)} x{told['speed']}",
        f"- peak memory: {report.spread(memory)} x{told['memory']}; {report.spread(leanest)} x the setting of TRL's that takes "
        f"least, {least / 1e9:.2f} GB",
        f"- loss curves: largest difference {max(gaps):.4f} nats over {len(gaps)} steps of the same pairs; TRL's own settings, "
        f"fp32 among them, lie up to {apart:.4f} apart",
    ]


def line(name: str, run: Run, data: dict[str, Any], workload: str) -> str:
    """One run as a table row."""
    if "failed" in run:
        return f"| {name} | could not run | | | | |"
    seconds, gflop = median(run["step_seconds"][run["warmup"] :]), data["rows"][workload]["useful_gflop_per_pair"]
    share = 100 * run["pairs_per_second"] * gflop / max(run["matmul_gflops"].values())
    return (
        f"| {name} | {run['pairs_per_second']:.2f} | {run['peak_memory_bytes'] / 1e9:.2f} | {seconds:.2f} | {share:.0f} % "
        f"| {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f} |"
    )


COMPARISON = Comparison(
    title="DPO with LoRA: speed and memory",
    sides={"trl": "benchmarks.dpo_trl", "ours": "benchmarks.dpo_ours"},
    grid=GRID,
    head="| run | pairs/s | peak GB | s/step | share of peak | loss, first -> last |\n|---|---|---|---|---|---|",
    spec=spec,
    finish=finish,
    score=lambda run: run["pairs_per_second"],
    told=lambda run: f"{run['pairs_per_second']:.2f} pairs/s",
    intro=intro,
    ratios=ratios,
    line=line,
)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the table."""
    arguments = parse(argv)
    compare(
        COMPARISON,
        arguments,
        {"steps": arguments.steps, "warmup": arguments.warmup, "batch": BATCH, "beta": 0.1},
    )


if __name__ == "__main__":
    main()
