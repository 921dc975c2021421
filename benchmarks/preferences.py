"""Preferences on real data: a reward model on rated sentences, then DPO and KTO of a language model toward what it rates higher.

    python -m benchmarks.preferences                # all cells that are missing; about twenty minutes on one core
    python -m benchmarks.preferences --only reward  # cells whose key contains this
    python -m benchmarks.preferences --render       # the tables alone, from the kept results

A cell is ``reward|model|rate|seed`` or ``policy|method|rate|0``. The reward model's rate is chosen by its accuracy on validation
pairs with the first seed; the first fit at that rate then rates what `starter:smollm2-135m` writes. Checkpoints and sampled pairs
lie in a folder of the cache and are made again where they are missing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import preference_cells as cells
from benchmarks import preferences_report, vader_cells
from benchmarks.lexicon import Lexicon
from benchmarks.row_files import read
from benchmarks.vader_cells import SEEDS, Kept, best_rate, chosen

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = RESULTS.parents[1] / "docs" / "techniques"
REWARD_RATES = (5e-5, 2e-4)
POLICY_RATES = (1e-3, 3e-4, 1e-4)
SETTING = {
    "train": cells.TRAIN,
    "val": cells.VAL,
    "test": cells.TEST,
    "gap": cells.GAP,
    "batch": cells.BATCH,
    "head_lr": cells.HEAD_LR,
    "prompts": cells.PROMPTS,
    "held_out": cells.HELD_OUT,
    "new_tokens": cells.NEW_TOKENS,
    "policy_batch": cells.POLICY_BATCH,
    "lora_r": cells.LORA_R,
    "beta": 0.1,
}
PROBE = "reward|probe|0|0"


def reward_keys(seed: int = SEEDS[0]) -> dict[float, str]:
    """Rate -> key of its cell."""
    return {rate: f"reward|minilm|{rate:g}|{seed}" for rate in REWARD_RATES}


def policy_keys() -> dict[str, tuple[str, float]]:
    """Key -> method and rate."""
    trained = {f"policy|{method}|{rate:g}|0": (method, rate) for rate in POLICY_RATES for method in ("DPO", "KTO")}
    return {"policy|start|0|0": ("start", 0.0), **trained}


def run(kept: Kept, work: Path, lexicon: Path | None) -> None:
    """Every missing cell."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = cells.write_pairs(folder)
        kept.ensure(PROBE, lambda: cells.probe_cell(files), "val/accuracy")

        def fit(rate: float, seed: int) -> None:
            key = reward_keys(seed)[rate]
            checkpoint = _checkpoint(work, key)
            kept.ensure(key, lambda: cells.reward_cell(rate, seed, files, folder, checkpoint), "val/accuracy")

        for rate in REWARD_RATES:
            fit(rate, SEEDS[0])
        best = best_rate(kept.cells, reward_keys(), "val/accuracy")
        if best is None:
            return
        missing = [key for key in policy_keys() if "scores" not in kept.cells.get(key, {}) and chosen(key, kept.only)]
        if missing:
            _policies(kept, files, work, folder, best, lexicon)
        for seed in SEEDS[1:]:
            fit(best, seed)


def _policies(kept: Kept, files: dict[str, str], work: Path, folder: Path, best: float, lexicon: Path | None) -> None:
    judge = Lexicon(lexicon)
    kept.content["lexicon"] = judge.sha256
    checkpoint = _checkpoint(work, reward_keys()[best])
    if not checkpoint.exists():  # another machine's results
        cells.reward_cell(best, SEEDS[0], files, folder, checkpoint)
    rater, answers = cells.Rater(checkpoint), work / "answers.jsonl"
    if not answers.exists():
        cells.write_answers("starter:smollm2-135m", files, rater, answers)
    kept.content["pairs"] = len(read(answers))
    for key, (method, rate) in policy_keys().items():

        def cell(method: str = method, rate: float = rate) -> dict[str, Any]:
            return cells.policy_cell(method, rate, str(answers), files, rater, judge, folder)

        kept.ensure(key, cell, "reward")


def _checkpoint(work: Path, key: str) -> Path:
    return work / f"{key.replace('|', '_')}.ckpt"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    from lightning_ft.models import starter

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preferences", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--render", action="store_true", help="write the tables from the kept results and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "preferences.json")
    parser.add_argument("--lexicon", type=Path, default=None, help="VADER's lexicon; by default the starter asset's")
    parser.add_argument(
        "--work",
        type=Path,
        default=starter.cache_folder() / "preferences",
        help="folder of checkpoints and sampled pairs",
    )
    arguments = parser.parse_args(argv)
    kept = Kept(arguments.output, SETTING, arguments.only)
    if not arguments.render:
        vader_cells.quiet()
        run(kept, arguments.work, arguments.lexicon)
    table = arguments.output.with_suffix(".md")
    table.write_text(preferences_report.render(kept.content, PROBE, reward_keys, policy_keys), encoding="utf-8")
    print(f"Written to {arguments.output} and {table}.")
    if arguments.output == RESULTS / "preferences.json":
        for name in ("reward_model", "dpo", "kto"):
            page = PAGES / f"{name}.md"
            text = page.read_text(encoding="utf-8")
            page.write_text(
                preferences_report.filled(text, kept.content, PROBE, reward_keys, policy_keys), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
