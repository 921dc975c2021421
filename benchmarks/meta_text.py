"""Few-shot text classification: the linear probe, prototypes and meta-learning on the same episodes of classes never seen.

    python -m benchmarks.meta_text --data my.csv [--base starter:minilm-l6] [--seeds 3] [--shots 1 5] [ROW ...]

``--data`` is a table of ``text`` and ``label`` with many classes, or several files of one. Rows that are done are kept in
benchmarks/results/meta_text.json, by the name of the data, and are not run again. Accuracy is over 600 five-way episodes of test
classes, with half the width of its 95 % interval; the best rate is not searched for: all rows have those of configs/.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ft import MAML, EpisodeData, LinearProbe, LoRA, ProtoNet, Reptile

RESULTS = Path(__file__).parent / "results" / "meta_text.json"
WAY = 5
HEAD = {"lr": 2e-5, "head_lr": 1e-3}
ROWS: dict[str, dict[str, Any]] = {
    "probe": {"module": LinearProbe, "train": False},
    "prototypes, untrained": {"module": ProtoNet, "train": False},
    "from scratch": {"module": MAML, "train": False, "order": 1, "steps": 20, "inner_lr": 0.5},
    "from scratch, head": {"module": MAML, "train": False, "order": 1, "inner": "head", "steps": 20, "inner_lr": 0.5},
    "protonet": {"module": ProtoNet, "lr": 2e-5},
    "maml": {"module": MAML, "order": 2, "steps": 2, "inner_lr": 0.1, **HEAD},
    "fomaml": {"module": MAML, "order": 1, "steps": 5, "inner_lr": 0.1, **HEAD},
    "anil": {"module": MAML, "inner": "head", "steps": 5, "inner_lr": 0.5, **HEAD},
    "maml_lora": {"module": MAML, "inner": "adapter_and_head", "steps": 2, "inner_lr": 0.5, "lr": 1e-3, "lora": True},
    "reptile": {"module": Reptile, "steps": 8, "inner_lr": 1e-3, "inner_optimizer": "adam", "lr": 0.5},
}


def run(
    row: dict[str, Any], data: dict[str, Any], base: str, *, shot: int, seed: int, episodes: tuple[int, int]
) -> dict[str, Any]:
    """Trains (or not) and tests one row; the split of classes and the test episodes follow from the seed alone."""
    pl.seed_everything(seed, verbose=False)
    arguments = {name: value for name, value in row.items() if name not in ("module", "train", "lora")}
    if row["module"] in (MAML, Reptile):
        arguments["eval_steps"] = [0, 1, 5, 10]
    module = row["module"](base, **arguments)
    rows = EpisodeData(**data, way=WAY, shot=shot, query=5, episodes=episodes[0], test_episodes=episodes[1], seed=seed)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoRA(r=8)] if row.get("lora") else [],
    )
    begin = time.perf_counter()
    if row.get("train", True):
        trainer.fit(module, rows)
    trained = time.perf_counter()
    (measured,) = trainer.test(module, rows, verbose=False)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    return {
        "accuracy": measured["test/accuracy"],
        "ci95": measured["test/accuracy_ci95"],
        "after": {
            name.removeprefix("test/step_").removesuffix("/accuracy"): value
            for name, value in measured.items()
            if name.startswith("test/step_") and name.endswith("/accuracy")
        },
        "train_seconds": round(trained - begin, 1),
        "test_seconds": round(time.perf_counter() - trained, 1),
        "peak_memory_bytes": memory,
    }


def main(words: list[str] | None = None) -> None:
    """Runs the rows that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--data", nargs="+", required=True, help="files with text and label")
    parser.add_argument("--text_column", default=None)
    parser.add_argument("--label_column", default=None)
    parser.add_argument("--base", default="starter:minilm-l6")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--episodes", type=int, default=800, help="of training, in meta-batches of four")
    parser.add_argument("--test_episodes", type=int, default=600)
    parser.add_argument("--val_classes", type=int, default=0)
    parser.add_argument("--test_classes", type=int, default=25)
    parser.add_argument("--name", default=None, help="of the data, in the results")
    given = parser.parse_args(words)
    name = given.name or Path(given.data[0]).stem
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    data = {
        "path": given.data if len(given.data) > 1 else given.data[0],
        "text_column": given.text_column,
        "label_column": given.label_column,
        "val_classes": given.val_classes,
        "test_classes": given.test_classes,
        "small_classes": "drop",
        "bad_rows": "drop",
    }
    for seed in range(given.seeds):
        for shot in given.shots:
            for row in given.rows or ROWS:
                key = f"{name}, {given.base}, {WAY}-way {shot}-shot, {given.episodes} episodes, {row}, seed {seed}"
                if key in kept:
                    continue
                kept[key] = run(
                    ROWS[row], data, given.base, shot=shot, seed=seed, episodes=(given.episodes, given.test_episodes)
                )
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
                print(f"{key}: {kept[key]['accuracy']:.3f} +- {kept[key]['ci95']:.3f}", flush=True)
    print(table(kept))


def table(kept: dict[str, Any]) -> str:
    """Means over seeds, one line for each row and number of shots."""
    lines: dict[str, list[float]] = {}
    for key, found in kept.items():
        lines.setdefault(key.rpartition(", seed ")[0], []).append(found["accuracy"])
    return "\n".join(f"{sum(v) / len(v):.3f} ({len(v)} seeds)  {key}" for key, v in sorted(lines.items()))


if __name__ == "__main__":
    main()
