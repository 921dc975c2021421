"""GRPO with LoRA: this library against TRL's GRPOTrainer + PEFT at the best of a grid of its settings.

    python -m benchmarks.grpo                # everything; takes about half an hour on two cores
    python -m benchmarks.grpo --quick        # two rounds of few tokens, one setting: does it run?

As in `benchmarks.sft`: every run is a process of its own, each setting of the grid once, then its best and this library in turn; a
finished run is kept and skipped the next time. Leave the machine alone meanwhile. Both sides draw their own answers to the same
prompts, so rates are in tokens that were really written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.grpo_trl import GRID
from benchmarks.runs import RESULTS, Store, launch

SIDES = {"trl": "benchmarks.grpo_trl", "ours": "benchmarks.grpo_ours"}
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


class Bench:
    """Runs cells, skipping those that are done."""

    def __init__(self, store: Store, workspace: Path, model: str, arguments: argparse.Namespace) -> None:
        """Keep what every cell needs."""
        self.store, self.workspace, self.model, self.arguments = store, workspace, model, arguments

    def cell(self, key: str, side: str, options: dict[str, Any]) -> dict[str, Any]:
        """One run, or its kept result."""
        kept = self.store.get(key)
        if kept is not None:
            return kept
        spec = {
            "model": self.model,
            "rows": str(self.workspace / f"{key.split('|')[0]}.jsonl"),
            "adapter": str(self.workspace / "adapter"),
            "batch_size": self.arguments.batch,
            "steps": self.arguments.rounds,
            "warmup": self.arguments.warmup,
            "lr": 1e-5,
            "options": {**self.arguments.sizes, **options},
        }
        print(f"{key}: ...", end="", flush=True)
        begun = time.perf_counter()
        try:
            result = launch(SIDES[side], [json.dumps(spec)])
            result["rates"] = rates(result)
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
        speeds = {setting: run["rates"]["round"] for setting, run in found.items() if "failed" not in run}
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
    found = run["rates"]
    return (
        f"{found['round']:.1f} tok/s (writing {found['writing']:.1f}, learning {found['learning']:.1f}), "
        f"{run['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def turns(data: dict[str, Any], workload: str) -> list[dict[str, Any]]:
    """The runs of each complete turn by side."""
    found: dict[int, dict[str, Any]] = {}
    for key, run in data["runs"].items():
        name, phase, side = key.split("|")
        if name == workload and phase.startswith("turn "):
            found.setdefault(int(phase.split()[1]), {})[side.split()[0]] = {**run, "setting": side.partition(" ")[2]}
    return [found[n] for n in sorted(found) if SIDES.keys() <= found[n].keys()]


def line(name: str, run: dict[str, Any], answers: int) -> str:
    """One run as a table row."""
    if "failed" in run:
        return f"| {name} | could not run | | | | |"
    timed = run["step_tokens"][run["warmup"] :]
    numbers = " | ".join(f"{run['rates'][rate]:.1f}" for rate in RATES)
    return f"| {name} | {numbers} | {run['peak_memory_bytes'] / 1e9:.2f} | {sum(timed) / len(timed) / answers:.1f} |"


def section(data: dict[str, Any], name: str) -> list[str]:
    """Everything about one workload."""
    settings, pairs = data["settings"], turns(data, name)
    answers = settings["prompts"] * settings["samples"]
    named = " | ".join(f"{words}, tok/s" for words in RATES.values())
    head = f"| run | {named} | peak GB | tokens an answer |\n|---|---|---|---|---|---|"
    out = [
        f"## Workload `{name}`",
        "",
        f"Prompts of {data['rows'][name]:.0f} tokens on average; {settings['prompts']} prompts a round, {settings['samples']} "
        f"answers of at most {settings['new_tokens']} tokens to each, one optimizer step a round in micro-batches of "
        f"{settings['batch']}; {settings['rounds']} rounds, the first {settings['warmup']} not timed.",
        "",
    ]
    if pairs:
        best = pairs[0]["trl"]["setting"]
        told = f"({len(pairs)} turns; median with least and greatest)"
        out += [f"**Against TRL + PEFT at its best setting, `{best}`** {told}", ""]
        for rate, words in RATES.items():
            ratios = [p["ours"]["rates"][rate] / p["trl"]["rates"][rate] for p in pairs]
            out.append(f"- {words}: {report.spread(ratios)} x" + (f" (aim {AIM:g})" if rate == "round" else ""))
        memory = [p["ours"]["peak_memory_bytes"] / p["trl"]["peak_memory_bytes"] for p in pairs]
        out += [f"- peak memory: {report.spread(memory)} x", "", head]
        for number, turn in enumerate(pairs):
            out += [line(f"{number}: TRL", turn["trl"], answers), line(f"{number}: ours", turn["ours"], answers)]
    rest = {key: run for key, run in data["runs"].items() if key.startswith((f"{name}|grid|", f"{name}|apart|"))}
    return [
        *out,
        "",
        "One run each:",
        "",
        head,
        *(line(key.split("|")[2], run, answers) for key, run in rest.items()),
        "",
    ]


def render(data: dict[str, Any]) -> str:
    """The whole page."""
    machine = data["machine"]
    out = [
        "# GRPO with LoRA: writing, learning and memory",
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
    settings = {**arguments.sizes, "rounds": arguments.rounds, "warmup": arguments.warmup, "batch": arguments.batch}
    with tempfile.TemporaryDirectory() as folder:
        facts = launch("benchmarks.pairs", ["--output", folder, "--workloads", ",".join(workloads)])
        store = Store(arguments.output, settings)
        rows = store.data.setdefault("rows", {})
        if arguments.output.exists():
            rows.update(json.loads(arguments.output.read_text()).get("rows", {}))
        rows.update({name: facts[name]["prompt_tokens"] for name in workloads})
        bench = Bench(store, Path(folder), facts["model"], arguments)
        grid = {"bf16-base-plain": GRID["bf16-base-plain"]} if arguments.quick else GRID
        for name in workloads:
            bench.workload(name, grid)
        table = render(store.data)
        arguments.output.with_suffix(".md").write_text(table, encoding="utf-8")
        print("\n" + table)
        print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
