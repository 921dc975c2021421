"""Controlled sentiment, the DPO paper's experiment in small: PPO, GRPO and DPO from one SFT model, reward against KL.

    python -m benchmarks.sentiment_rl                        # each cell is kept when it is done; started again it goes on
    python -m benchmarks.sentiment_rl --at-once 6            # so many cells at once, each a process, where nothing is to wait for
    python -m benchmarks.sentiment_rl --only ppo,grpo        # cells whose key contains one of these
    python -m benchmarks.sentiment_rl --render               # table and plot alone, from what is kept
    python -m benchmarks.sentiment_rl --tiny --folder /tmp/rl --output /tmp/rl.json              # does it run? a random model

1. ``rater``: MiniLM learns people's ratings of VADER's sentences: the ground truth of this experiment, which no policy trains on.
2. ``sft``: SmolLM2 with LoRA learns to go on with the first words of such sentences.
3. ``pairs``: the SFT model writes two ends for each beginning; the rater says which is the more positive.
4. ``reward``: a reward model learns from these pairs.
5. ``ppo``, ``grpo`` (rewarded by it) and ``dpo`` (on the pairs), two betas each, all from the SFT adapter, on the same beginnings
   and for as many optimizer steps. Every few rounds each writes ends for held-out beginnings, of which are measured: what the
   reward model, the rater and the lexicon say, and the KL from the SFT model.

The lexicon of VADER judges by words, and nothing here has learned from it. On a GPU everything runs there, as Lightning chooses.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lightning.pytorch as pl  # noqa: E402

from benchmarks import pages, sentiment_report  # noqa: E402
from benchmarks import sentiment_cells as cells  # noqa: E402
from benchmarks.cell_jobs import device, run_cells  # noqa: E402
from benchmarks.runs import RESULTS, Store  # noqa: E402
from benchmarks.vader_cells import chosen, quiet  # noqa: E402

BETAS = {"ppo": (0.02, 0.1), "grpo": (0.02, 0.1), "dpo": (0.05, 0.5)}
FIRST = {"rater": (), "sft": (), "pairs": ("rater", "sft"), "reward": ("pairs",)}
"""Stages that all runs begin from, and what each of them needs."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sentiment_rl", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--lexicon", type=Path, help="VADER's lexicon; by default the starter asset's")
    parser.add_argument("--tiny", action="store_true", help="random models and two steps of everything")
    parser.add_argument("--rounds", type=int, help=f"rounds of a run; {cells.Plan.rounds} without")
    parser.add_argument("--lr", type=float, help=f"rate of the runs; {cells.Plan.lr:g} without")
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--at-once", type=int, default=1, help="cells that run at a time, each a process of its own")
    parser.add_argument("--render", action="store_true", help="write table and plot from what is kept and run nothing")
    parser.add_argument("--folder", type=Path, default=Path("runs/sentiment_rl"), help="models and rows of the stages")
    parser.add_argument("--output", type=Path, default=RESULTS / "sentiment_rl.json", help="what was measured")
    parser.add_argument("--plot", type=Path, help="by default below docs/images, or beside another --output")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output.resolve()
    if arguments.plot is None:
        kept = arguments.output == RESULTS / "sentiment_rl.json"
        arguments.plot = sentiment_report.PLOT if kept else arguments.output.with_suffix(".png")
    return arguments


def needs() -> dict[str, tuple[str, ...]]:
    """Key of each cell -> keys of those that it begins from."""
    runs = {f"{kind} {beta}": ("reward",) for kind, betas in BETAS.items() for beta in betas}
    return {**FIRST, **runs}


def make(key: str, folder: Path, plan: cells.Plan, lexicon: Path | None) -> dict[str, Any]:
    """One cell."""
    stages: dict[str, Callable[[Path, cells.Plan], dict[str, float]]] = {
        "rater": cells.rater,
        "sft": cells.sft,
        "pairs": cells.pairs,
        "reward": cells.reward,
    }
    pl.seed_everything(0, verbose=False)
    begun = time.monotonic()
    if key in stages:
        found: dict[str, Any] = stages[key](folder, plan)
    else:
        kind, beta = key.split()
        found = cells.learn(kind, float(beta), folder, plan, lexicon)
    return {**found, "device": device(), "seconds": round(time.monotonic() - begun, 1)}


def publish(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Table, plot and, of the results that are kept, the block in the docs."""
    table = args.output.with_suffix(".md")
    table.write_text(sentiment_report.render(data), encoding="utf-8")
    sentiment_report.plot(data, args.plot)
    if args.output == RESULTS / "sentiment_rl.json":
        pages.fill(RESULTS.parents[1] / "docs" / "techniques" / "ppo.md", "sentiment_rl", sentiment_report.docs(data))
    print(f"Written to {args.output}, {table} and {args.plot}.")


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; returns the exit code."""
    args = parse(argv)
    if args.render:  # they may be those of another machine
        publish(args, json.loads(args.output.read_text()))
        return 0
    folder: Path = args.folder.resolve()
    plan = cells.tiny(folder) if args.tiny else cells.Plan()
    plan = replace(plan, rounds=args.rounds or plan.rounds, lr=args.lr or plan.lr)
    settings = {**asdict(plan), "betas": {k: list(v) for k, v in BETAS.items()}}
    if args.tiny:
        settings |= {"base": "tiny", "rater_base": "tiny"}
    store = Store(args.output, settings)

    def done(key: str) -> bool:
        store.read()
        return store.get(key) is not None

    cells.prepare(folder, plan)
    if args.cell is not None:
        quiet()
        store.put(args.cell, make(args.cell, folder, plan, args.lexicon))
        return 0
    words = ["--folder", str(folder), "--output", str(args.output), *(["--tiny"] if args.tiny else [])]
    words += ["--rounds", str(plan.rounds), "--lr", str(plan.lr)]
    words += ["--lexicon", str(args.lexicon.resolve())] if args.lexicon is not None else []
    failed = run_cells(
        "benchmarks.sentiment_rl", needs(), words, at_once=args.at_once, done=done,
        wanted=lambda key: chosen(key, args.only),
    )  # fmt: skip
    store.read()
    publish(args, store.data)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
