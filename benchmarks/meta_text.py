"""Few-shot text classification: the linear probe, prototypes and meta-learning on the same episodes of classes never seen.

    python -m benchmarks.meta_text --data FOLDER                    # all cells that are missing, one process a core
    python -m benchmarks.meta_text --data FOLDER --only "|MAML|"   # cells whose key contains this
    python -m benchmarks.meta_text --render                         # the tables alone, from the kept results

``--data`` is a table of text and label with many classes, several files of one, or a folder of CSV files. A cell is
``data|shots|row|seed``, a process of its own with one thread, on the GPU where there is one; it is kept when it is done. The seed
splits the classes and draws the episodes. Accuracy is over 600 five-way episodes of test classes, with half the width of its 95 %
interval; rates are those of configs/, not searched for, but for Reptile's, which were chosen on validation classes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks import measure, meta_report, vader_cells
from benchmarks.process_cells import run_cells
from benchmarks.silent import silent_trainer
from benchmarks.vader_cells import Kept
from lightning_ft import MAML, EpisodeData, LinearProbe, LoRA, ProtoNet, Reptile

RESULTS = Path(__file__).resolve().parent / "results"
WAY = 5
EVAL_STEPS = [0, 1, 5, 10]
CELL_SECONDS = 4 * 3600.0
"""That a cell may take: on one busy core some take more than an hour."""
HEAD = {"lr": 2e-5, "head_lr": 1e-3}
# The longest first, so that processes end at about the same time.
ROWS: dict[str, dict[str, Any]] = {
    "MAML": {"module": MAML, "order": 2, "steps": 2, "inner_lr": 0.1, **HEAD},
    "MAML-LoRA": {"module": MAML, "inner": "adapter_and_head", "steps": 2, "inner_lr": 0.5, "lr": 1e-3, "lora": True},
    "Reptile": {"module": Reptile, "steps": 8, "inner_lr": 0.1, "inner_batch": 10, "lr": 1.0, "train_shot": 15},
    "FOMAML": {"module": MAML, "order": 1, "steps": 5, "inner_lr": 0.1, **HEAD},
    "ANIL": {"module": MAML, "inner": "head", "steps": 5, "inner_lr": 0.5, **HEAD},
    "from scratch": {"module": MAML, "train": False, "order": 1, "steps": 20, "inner_lr": 0.1},
    "from scratch, head": {"module": MAML, "train": False, "order": 1, "inner": "head", "steps": 20, "inner_lr": 0.5},
    "ProtoNet": {"module": ProtoNet, "lr": 2e-5},
    "prototypes, untrained": {"module": ProtoNet, "train": False},
    "probe": {"module": LinearProbe, "train": False},
}


def clip_of(module: type) -> float | None:
    """The gradient norm at which a step is clipped; Reptile's is the length of a way, of several units, and stays as it is."""
    return None if module is Reptile else 1.0


def cell(row: dict[str, Any], data: dict[str, Any], base: str, *, shot: int, seed: int) -> dict[str, Any]:
    """Trains (or not) and tests one row; the split of classes and the test episodes follow from the seed alone.

    Args:
        row: one of `ROWS`.
        data: arguments of `EpisodeData`.
        base: the encoder.
        shot: support rows of a class.
        seed: of everything.
    """
    pl.seed_everything(seed, verbose=False)
    arguments = {name: value for name, value in row.items() if name not in ("module", "train", "lora", "train_shot")}
    if row["module"] in (MAML, Reptile):
        arguments["eval_steps"] = EVAL_STEPS
    module = row["module"](base, **arguments)
    rows = EpisodeData(
        **data,
        way=WAY,
        shot=shot,
        train_shot=row.get("train_shot"),
        query=5,
        small_classes="drop",
        bad_rows="drop",
        seed=seed,
    )
    trainer = silent_trainer(
        None,
        [LoRA(r=8)] if row.get("lora") else [],
        accelerator="auto",
        devices=1,
        max_epochs=1,
        gradient_clip_val=clip_of(row["module"]),
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    begin = time.perf_counter()
    if row.get("train", True):
        trainer.fit(module, rows)
    trained = time.perf_counter()
    (measured,) = trainer.test(module, rows, verbose=False)
    cuda = trainer.strategy.root_device.type == "cuda"
    return {
        "scores": {name.removeprefix("test/"): round(value, 5) for name, value in measured.items()},
        "train_seconds": round(trained - begin, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else measure.peak_memory_bytes(),
        "device": torch.cuda.get_device_name() if cuda else measure.cpu_model(),
        "torch": torch.__version__,
    }


def keys(name: str, shots: list[int], seeds: int) -> dict[str, tuple[int, str, int]]:
    """Key -> (shots, row, seed); all rows with the first seed before another."""
    return {
        f"{name}|{shot}-shot|{row}|{seed}": (shot, row, seed) for seed in range(seeds) for shot in shots for row in ROWS
    }


def files_of(given: list[str]) -> str | list[str]:
    """The files of a folder, or those named."""
    found = [str(file) for one in given for file in (sorted(Path(one).glob("*.csv")) if Path(one).is_dir() else [one])]
    if not found:
        raise SystemExit(f"--data {given[0]} holds no CSV file; give a folder of them, or files.")
    return found if len(found) > 1 else found[0]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_text", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", nargs="+", default=None, help="a folder of CSV files, or files, with text and label")
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--render", action="store_true", help="write the tables from the kept results and run nothing")
    parser.add_argument("--text_column", default=None)
    parser.add_argument("--label_column", default=None)
    parser.add_argument("--base", default="starter:minilm-l6")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 1])
    parser.add_argument("--episodes", type=int, default=800, help="of training, in meta-batches of four")
    parser.add_argument("--test_episodes", type=int, default=600)
    parser.add_argument("--val_classes", type=int, default=0)
    parser.add_argument("--test_classes", type=int, default=25)
    parser.add_argument("--name", default=None, help="of the data, in the results")
    parser.add_argument("--output", type=Path, default=RESULTS / "meta_text.json")
    parser.add_argument("--cell", default=None, help="run this one here, and print its result")
    given = parser.parse_args(argv)
    vader_cells.quiet()
    torch.set_num_threads(1)
    numbers = ("episodes", "test_episodes", "val_classes", "test_classes")
    setting = {"base": given.base, "way": WAY, **{name: getattr(given, name) for name in numbers}}
    if not given.render:
        if given.data is None:
            parser.error("--data is needed: a folder of CSV files, or files")
        columns = {"text_column": given.text_column, "label_column": given.label_column}
        data = {"path": files_of(given.data), **columns, **{name: getattr(given, name) for name in numbers}}
        planned = keys(given.name or Path(given.data[0]).stem, given.shots, given.seeds)
        if given.cell:
            shot, row, seed = planned[given.cell]
            print(json.dumps(cell(ROWS[row], data, given.base, shot=shot, seed=seed)))
            return
    kept = Kept(given.output, setting, given.only)
    if not given.render:
        if kept.content.get("setting", setting) != setting:
            raise SystemExit(f"{given.output} holds cells of another setting; give another --output.")
        words = sys.argv[1:] if argv is None else argv
        cells = {key: [*words, "--cell", key] for key in planned}
        run_cells(kept, "benchmarks.meta_text", cells, score="accuracy", jobs=given.jobs, limit=CELL_SECONDS)
    meta_report.write(given.output, RESULTS)


if __name__ == "__main__":
    main()
