"""Every method of training few parameters beside full training, on both starter models: scores, then speed and memory.

    python -m benchmarks.methods                    # all scores that are missing; hours on one core; goes on where it stopped
    python -m benchmarks.methods --only encoder     # cells whose key contains this
    python -m benchmarks.methods --speed            # tokens/s and peak memory: alone on the machine, about half an hour
    python -m benchmarks.methods --render           # the table alone, from the kept results

A cell is (model, method, rate, seed). The rate of a method is chosen among three on validation rows with the first seed: by
accuracy of the encoder, by loss of the decoder. Two more seeds of the encoder run at that rate; only test rows are reported.
Cells of the encoder's classification that `supervised` has made are taken from its results: they are the same runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import methods_report, methods_speed, vader_cells
from benchmarks.method_list import DECODER, ENCODER, methods, setting
from benchmarks.vader_cells import SEEDS, Kept, best_rate

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "guides" / "choosing.md"
SETTING = {
    "encoder": {
        "train": vader_cells.TRAIN,
        "val": vader_cells.VAL,
        "test": vader_cells.TEST,
        "steps": vader_cells.STEPS,
        "batch": vader_cells.BATCH,
        "head_lr": vader_cells.HEAD_LR,
    },
    "decoder": {
        "train": vader_cells.ASKED_TRAIN,
        "val": vader_cells.ASKED_VAL,
        "test": vader_cells.ASKED_TEST,
        "steps": vader_cells.ASKED_TRAIN // vader_cells.ASKED_BATCH,
        "batch": vader_cells.ASKED_BATCH,
    },
}
SCORES = {ENCODER: "val/accuracy", DECODER: "val/loss"}
"""What the rate of a method is chosen by."""
SHARED_TASK = "classification"


def keys(model: str, method: str, seed: int = SEEDS[0]) -> dict[float, str]:
    """Rate -> key of its cell."""
    return {rate: f"{model}|{method}|{rate:g}|{seed}" for rate in methods()[method].rates[model]}


def take_over(kept: Kept, shared: Path) -> int:
    """Copies the encoder's cells that `supervised` has made, under this benchmark's keys; how many were new."""
    found = json.loads(shared.read_text())["cells"] if shared.exists() else {}
    new = 0
    for method in methods():
        for seed in SEEDS:
            for rate, key in keys(ENCODER, method, seed).items():
                theirs = found.get(f"{SHARED_TASK}|{method}|{rate:g}|{seed}", {})
                if "scores" in theirs and "scores" not in kept.cells.get(key, {}):
                    kept.cells[key] = {**theirs, "from": "supervised"}
                    new += 1
    return new


def plan(kept: Kept) -> Iterator[tuple[str, str, float, int]]:
    """(model, method, rate, seed) in order: the encoder, then the decoder's full training and LoRA, then its others."""
    for method, about in methods().items():
        for rate in about.rates[ENCODER]:
            yield ENCODER, method, rate, SEEDS[0]
        best = best_rate(kept.cells, keys(ENCODER, method), SCORES[ENCODER])
        for seed in SEEDS[1:] if best is not None else ():
            yield ENCODER, method, best, seed  # type: ignore[misc]
    for method, about in methods().items():
        for rate in about.rates[DECODER]:
            yield DECODER, method, rate, SEEDS[0]


def run(kept: Kept, skip: str) -> None:
    """Every missing cell."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sentences, questions = vader_cells.write_rows(folder), vader_cells.write_questions(folder)
        for model, method, rate, seed in plan(kept):
            key = keys(model, method, seed)[rate]
            if skip and vader_cells.chosen(key, skip):
                continue

            def cell(model: str = model, method: str = method, rate: float = rate, seed: int = seed) -> dict[str, Any]:
                chosen = methods()[method]
                callbacks = chosen.callbacks(setting(model, SETTING[model]["steps"]))
                if model == ENCODER:
                    return vader_cells.encoder_cell(
                        SHARED_TASK, callbacks, rate, seed, sentences, folder, **chosen.model
                    )
                return vader_cells.decoder_cell(callbacks, rate, seed, questions, folder, **chosen.model)

            kept.ensure(key, cell, SCORES[model])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--skip", default="", help="no cells whose key contains one of these")
    parser.add_argument("--speed", action="store_true", help="measure tokens/s and peak memory instead of scores")
    parser.add_argument("--turns", type=int, default=2, help="how often --speed measures each method")
    parser.add_argument("--render", action="store_true", help="write the table from the kept results and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "methods.json")
    parser.add_argument(
        "--shared", type=Path, default=RESULTS / "supervised.json", help="results of benchmarks.supervised"
    )
    arguments = parser.parse_args(argv)
    kept = Kept(arguments.output, SETTING, arguments.only)
    if take_over(kept, arguments.shared):
        kept.save()
    if arguments.speed:
        methods_speed.measure_all(kept, arguments.turns, arguments.only, arguments.skip)
    elif not arguments.render:
        vader_cells.quiet()
        run(kept, arguments.skip)
    table = arguments.output.with_suffix(".md")
    table.write_text(methods_report.render(kept.content, keys, SCORES), encoding="utf-8")
    print(f"Written to {arguments.output} and {table}.")
    if arguments.output == RESULTS / "methods.json" and PAGE.exists():
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(methods_report.filled(page, kept.content, keys, SCORES), encoding="utf-8")


if __name__ == "__main__":
    main()
