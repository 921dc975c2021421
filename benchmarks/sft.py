"""SFT with LoRA: this library against TRL + PEFT at the best of a grid of its settings, and against a bare loop.

    python -m benchmarks.sft                 # everything; takes about half an hour on two cores
    python -m benchmarks.sft --quick         # three steps, two settings: does it run?

See `benchmarks.turns`: TRL's best setting, this library and the bare loop are run in turn, A B C A B C; ``--redo NAME``
repeats kept runs whose key contains NAME. Leave the machine alone meanwhile: on two cores another busy process makes steps
ten times slower.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.runs import RESULTS
from benchmarks.trl_side import CHECKPOINTED, GRID
from benchmarks.turns import Match, play

BATCH = {"long": 8, "short": 16}
QUICK_GRID = ("bf16-base-plain-padded", "bf16-base-plain-packed-sdpa")


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


def spec(
    workload: str, options: dict[str, Any], facts: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a side is told."""
    return {
        "batch_size": BATCH[workload],
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "options": options,
    }


MATCH = Match(
    sides={"trl": "benchmarks.trl_side", "ours": "benchmarks.our_side", "plain": "benchmarks.plain_loop"},
    grid=GRID,
    rows="benchmarks.rows",
    spec=spec,
    score=lambda run: run["tokens_per_second"],
    told=lambda run: f"{run['tokens_per_second']:.0f} tokens/s",
)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the table."""
    arguments = parse(argv)
    chosen = [name for name in arguments.grid.split(",") if name] or list(GRID)

    def grid_of(name: str, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
        grid = {setting: GRID[setting] for setting in chosen}
        if name == "short" and "long|turn 0|ours" in data["runs"]:
            # The grid on short rows: one setting of each layout, at the precisions that led on long rows.
            return report.leaders(data, grid)
        return grid

    apart: dict[str, tuple[str, dict[str, Any]]] = {}
    if arguments.checkpointing:
        apart = {"checkpointed|trl": ("trl", CHECKPOINTED), "checkpointed|ours": ("ours", {"checkpointing": True})}
    settings = {"steps": arguments.steps, "warmup": arguments.warmup, "batch": BATCH}
    play(MATCH, arguments, settings, report.render, grid_of=grid_of, apart=apart)


if __name__ == "__main__":
    main()
