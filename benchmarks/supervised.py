"""Full training against training few parameters: one encoder, one data set, one budget, several methods and rates.

    python -m benchmarks.supervised                    # all cells that are missing; about an hour on two cores
    python -m benchmarks.supervised --only regression  # cells whose key contains this
    python -m benchmarks.supervised --render           # the table alone, from the kept results

A cell is (task, method, rate, seed). Each is kept when it is done and skipped the next time. The rate of each method is
chosen among three by its score on validation rows with seed 0; two more seeds run at that rate; only test rows are
reported. The data set, its split and the order of rows are the same for all; the seed draws the head and the factors.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import measure
from lightning_ft.functional.intervals import mean_interval

OUTPUT = Path(__file__).resolve().parent / "results" / "supervised.json"
DOMAINS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets")
TRAIN, VAL, TEST, STEPS, BATCH, SEEDS = 2000, 400, 1000, 63, 32, (0, 1, 2)
TASKS = {"classification": "val/accuracy", "regression": "val/pearson"}
"""Task -> what is reported of it; higher is better."""
HEAD_LR = 1e-3
"""Rate of the new head, wherever the body trains at a lower one."""
RATES = {
    "full": (5e-5, 1e-4, 2e-4),
    "frozen body": (1e-3, 3e-3, 1e-2),
    "BitFit": (5e-4, 2e-3, 5e-3),
    "gradual": (1e-4, 2e-4, 4e-4),
    "LoRA": (2e-4, 5e-4, 1e-3),
    "DoRA": (2e-4, 5e-4, 1e-3),
}


def techniques() -> dict[str, Callable[[], list[Any]]]:
    """Method -> its callbacks, made anew for each run."""
    from lightning_ft import Freeze, GradualUnfreezing, LoRA

    return {
        "full": lambda: [],
        "frozen body": lambda: [Freeze(["head"])],
        "BitFit": lambda: [Freeze(["biases", "head"])],
        # Half of the run thaws a part every 4 steps: the head, six blocks, the embeddings.
        "gradual": lambda: [GradualUnfreezing(4, unit="step")],
        "LoRA": lambda: [LoRA(8)],
        "DoRA": lambda: [LoRA(8, dora=True)],
    }


def write_rows(folder: Path) -> dict[str, str]:
    """Split -> file of clearly rated sentences of three domains, each once, shuffled with one seed."""
    from lightning_ft.data.vader import ratings

    rows: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        for rating, text in ratings(domain):
            if abs(rating) > 0.5:
                key = " ".join(text.lower().split())
                rows.setdefault(
                    key, {"text": text, "label": "positive" if rating > 0 else "negative", "rating": rating}
                )
    chosen = list(rows.values())
    random.Random(0).shuffle(chosen)
    files, begin = {}, 0
    for split, count in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen[begin : begin + count]), encoding="utf-8")
        files[split], begin = str(file), begin + count
    return files


def cell(task: str, method: str, rate: float, seed: int, files: dict[str, str], folder: Path) -> dict[str, Any]:
    """One fit, then its scores on validation and test rows."""
    import lightning.pytorch as pl

    from lightning_ft import SFT, ClassificationData

    pl.seed_everything(seed, verbose=False)
    regression = task == "regression"
    module = SFT(
        "starter:minilm-l6",
        task="regression" if regression else "sequence_classification",
        lr=rate,
        head_lr=max(rate, HEAD_LR),
    )
    data = ClassificationData(
        files["train"],
        val_path=files["val"],
        test_path=files["test"],
        label_column="rating" if regression else "label",
        task="regression" if regression else "sequence_classification",
        batch_size=BATCH,
        val_batch_size=64,
        packing=True,  # half of the padded positions would hold nothing
        seed=0,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=techniques()[method](),
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    begun = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - begun
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    judge = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (val,) = judge.validate(module, data, verbose=False)
    (test,) = judge.test(module, data, verbose=False)
    measured = {**val, **test}
    return {"seconds": seconds, "trainable": trainable, "scores": {k: float(v) for k, v in measured.items()}}


def run(only: str) -> None:
    """Every missing cell: the grid of rates with the first seed, then the other seeds at the best rate."""
    kept: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"cells": {}}
    kept["machine"] = measure.machine()
    kept["setting"] = {"train": TRAIN, "val": VAL, "test": TEST, "steps": STEPS, "batch": BATCH, "head_lr": HEAD_LR}
    with tempfile.TemporaryDirectory() as name:
        files = write_rows(Path(name))

        def ensure(task: str, method: str, rate: float, seed: int) -> None:
            key = f"{task}|{method}|{rate:g}|{seed}"
            if key in kept["cells"] or only not in key:
                return
            kept["cells"][key] = cell(task, method, rate, seed, files, Path(name))
            part = OUTPUT.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            part.replace(OUTPUT)
            found = kept["cells"][key]
            print(f"{key}: {found['scores'][TASKS[task]]:.4f} on validation rows, {found['seconds']:.0f} s", flush=True)

        for task in TASKS:
            for method, rates in RATES.items():
                for rate in rates:
                    ensure(task, method, rate, SEEDS[0])
                best = best_rate(kept["cells"], task, method)
                for seed in SEEDS[1:] if best is not None else ():
                    ensure(task, method, best, seed)  # type: ignore[arg-type]


def best_rate(cells: dict[str, Any], task: str, method: str) -> float | None:
    """The rate with the best validation score of the first seed; None while the grid is not complete."""
    keys = {rate: f"{task}|{method}|{rate:g}|{SEEDS[0]}" for rate in RATES[method]}
    if not all(key in cells for key in keys.values()):
        return None
    return max(keys, key=lambda rate: cells[keys[rate]]["scores"][TASKS[task]])


def render() -> str:
    """The table of what is kept."""
    kept = json.loads(OUTPUT.read_text())
    setting, versions = kept["setting"], kept["machine"]["versions"]
    lines = [
        "# Full training against training few parameters",
        "",
        f"`starter:minilm-l6` (22.7 M parameters, of which 11.7 M are embeddings) on VADER's clearly rated sentences of "
        f"three domains: {setting['train']} train, {setting['val']} validation, {setting['test']} test rows; "
        f"{setting['steps']} steps of {setting['batch']} rows for every method; the new head at {setting['head_lr']:g} or the "
        "method's rate, whichever is higher. Rate: the best of three on validation rows with seed 0. Scores on test rows: mean "
        "of three seeds with Student's 95 % interval (three seeds make it wide).",
        "",
        f"{kept['machine']['cpu']}, {kept['machine']['cores']} cores; torch {versions['torch']}, lightning "
        f"{versions['lightning']}, transformers {versions['transformers']}. One thread; other processes ran beside it, so that "
        "seconds are not compared.",
    ]
    for task, score in TASKS.items():
        name = score.replace("val/", "")
        lines += ["", f"## {task.capitalize()}", "", f"| method | trained | rate | test {name} | 95 % | seeds |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for method in RATES:
            rate = best_rate(kept["cells"], task, method)
            if rate is None:
                continue
            cells = [kept["cells"].get(f"{task}|{method}|{rate:g}|{seed}") for seed in SEEDS]
            done = [one for one in cells if one is not None]
            values = [one["scores"][score.replace("val/", "test/")] for one in done]
            low, high = mean_interval(values) if len(values) > 1 else (float("nan"), float("nan"))
            trained = f"{done[0]['trainable']:,}"
            lines.append(
                f"| {method} | {trained} | {rate:g} | {mean(values):.3f} | {low:.3f} to {high:.3f} | "
                f"{', '.join(f'{value:.3f}' for value in values)} |"
            )
        lines += ["", "Validation scores of the grid (seed 0):", "", "| method | rate: score |", "| --- | --- |"]
        for method, rates in RATES.items():
            found = {r: kept["cells"].get(f"{task}|{method}|{r:g}|{SEEDS[0]}") for r in rates}
            shown = ", ".join(f"{r:g}: {one['scores'][score]:.3f}" for r, one in found.items() if one)
            lines.append(f"| {method} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supervised", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only cells whose key contains this")
    parser.add_argument("--render", action="store_true", help="write the table from the kept results and run nothing")
    arguments = parser.parse_args()
    if not arguments.render:
        warnings.filterwarnings("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        run(arguments.only)
    OUTPUT.with_suffix(".md").write_text(render(), encoding="utf-8")
    print(f"Written to {OUTPUT} and {OUTPUT.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
