"""GRPO with LoRA: this library against TRL's GRPOTrainer + PEFT at the best of a grid of its settings.

    python -m benchmarks.grpo                # everything; takes hours on two cores, see --rounds and --workloads
    python -m benchmarks.grpo --quick        # two rounds of few tokens, one setting: does it run?

See `benchmarks.side_by_side`. Leave the machine alone meanwhile. Both sides draw their own answers to the same prompts, so rates
are in tokens that were really written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.grpo_trl import GRID
from benchmarks.report import Run
from benchmarks.runs import RESULTS
from benchmarks.side_by_side import Comparison, compare

WHOLE = {"prompts": 4, "samples": 8, "new_tokens": 64}
QUICK = {"prompts": 2, "samples": 4, "new_tokens": 8}
RATES = {"round": "end to end", "writing": "writing", "learning": "learning"}
AIM = 2.0
"""How many times as fast end to end it is hoped to be."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small rounds, one setting, one turn; keeps nothing")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the two sides")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a run, warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first rounds that are not timed")
    parser.add_argument(
        "--workloads", default="long,short", help="which of long, short: prompts of about 500 or 20 tokens"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "grpo.json", help="results; the table lies beside it")
    arguments = parser.parse_args(argv)
    arguments.sizes, arguments.batch = WHOLE, 8
    if arguments.quick:
        arguments.rounds, arguments.warmup, arguments.repeats, arguments.workloads = 2, 1, 1, "short"
        arguments.sizes, arguments.batch = QUICK, 4
        arguments.output = Path(tempfile.mkdtemp()) / "grpo.json"
    return arguments


def rates(run: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of whole rounds, of their writing and of the rest, warm-up left out."""
    begin = run["warmup"]
    whole, tokens = run["step_seconds"][begin:], sum(run["step_tokens"][begin:])
    writing = run["options"]["writing_seconds"][begin : len(run["step_seconds"])]
    return {
        "round": tokens / sum(whole),
        "writing": tokens / sum(writing),
        "learning": tokens / max(sum(whole) - sum(writing), 1e-9),
    }


def spec(
    workload: str, options: dict[str, Any], facts: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a side is told."""
    return {
        "batch_size": arguments.batch,
        "steps": arguments.rounds,
        "warmup": arguments.warmup,
        "lr": 1e-5,
        "options": {**arguments.sizes, **options},
    }


def finish(run: Run, workload: str) -> None:
    """Adds its rates."""
    run["rates"] = rates(run)


def told(run: Run) -> str:
    """The rates in a few words."""
    found = run["rates"]
    return f"{found['round']:.1f} tok/s (writing {found['writing']:.1f}, learning {found['learning']:.1f})"


def intro(data: dict[str, Any], name: str) -> str:
    """What the prompts are, and what a round is."""
    settings = data["settings"]
    return (
        f"Prompts of {data['rows'][name]['prompt_tokens']:.0f} tokens on average; {settings['prompts']} prompts a round, "
        f"{settings['samples']} answers of at most {settings['new_tokens']} tokens to each, one optimizer step a round in "
        f"micro-batches of {settings['batch']}; {settings['rounds']} rounds, the first {settings['warmup']} not timed."
    )


def ratios(data: dict[str, Any], name: str, pairs: list[dict[str, Run]]) -> list[str]:
    """Rates and memory beside TRL's."""
    lines = []
    for rate, words in RATES.items():
        found = [pair["ours"]["rates"][rate] / pair["trl"]["rates"][rate] for pair in pairs]
        lines.append(f"- {words}: {report.spread(found)} x" + (f" (aim {AIM:g})" if rate == "round" else ""))
    return [*lines, f"- peak memory: {report.spread(report.ratios(pairs, 'ours', 'trl', 'peak_memory_bytes'))} x"]


def line(name: str, run: Run, data: dict[str, Any], workload: str) -> str:
    """One run as a table row."""
    if "failed" in run:
        return f"| {name} | could not run | | | | |"
    timed, answers = run["step_tokens"][run["warmup"] :], data["settings"]["prompts"] * data["settings"]["samples"]
    numbers = " | ".join(f"{run['rates'][rate]:.1f}" for rate in RATES)
    return f"| {name} | {numbers} | {run['peak_memory_bytes'] / 1e9:.2f} | {sum(timed) / len(timed) / answers:.1f} |"


COMPARISON = Comparison(
    title="GRPO with LoRA: writing, learning and memory",
    sides={"trl": "benchmarks.grpo_trl", "ours": "benchmarks.grpo_ours"},
    grid=GRID,
    head=f"| run | {' | '.join(f'{words}, tok/s' for words in RATES.values())} | peak GB | tokens an answer |\n"
    "|---|---|---|---|---|---|",
    spec=spec,
    finish=finish,
    score=lambda run: run["rates"]["round"],
    told=told,
    intro=intro,
    ratios=ratios,
    line=line,
)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the table."""
    arguments = parse(argv)
    settings = {**arguments.sizes, "rounds": arguments.rounds, "warmup": arguments.warmup, "batch": arguments.batch}
    compare(COMPARISON, arguments, settings)


if __name__ == "__main__":
    main()
