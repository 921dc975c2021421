"""Meta-learning of sine waves through the Lightning modules, against numbers measured without any of this library's code.

    python -m benchmarks.meta_sinusoid                     # all cells that are missing, one process a core
    python -m benchmarks.meta_sinusoid --only maml_15k     # cells whose key contains this
    python -m benchmarks.meta_sinusoid --jobs 16           # that many processes at once, with one thread each
    python -m benchmarks.meta_sinusoid --speed             # one meta-iteration beside two plain loops; run nothing else meanwhile
    python -m benchmarks.meta_sinusoid --render            # the tables alone, from the kept results

A cell is ``row|seed``, a process of its own that is kept when it is done; one that was stopped goes on at its last checkpoint in
``--work``, with the same result. ``expected`` are means and half widths of 95 % intervals over 600 tasks from an implementation in
NumPy and float64, whose Hessian products were checked against finite differences.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks import meta_report, vader_cells
from benchmarks.process_cells import run_cells
from benchmarks.silent import silent_trainer
from benchmarks.vader_cells import Kept
from lightning_ft import MAML, EpisodeData, Reptile
from lightning_ft.nn.small_nets import MLP

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = "lightning_ft.data.sinusoids.sinusoids"
BATCH = 25
SEEDS = (0, 1)
SAVE_EVERY = 500
EVALUATED = 600
SETTING = {"tasks": EVALUATED, "batch": BATCH, "query": 100, "seeds": list(SEEDS)}


def maml(iterations: int, *, order: int, steps: int, **expected: tuple[float, float | None]) -> dict[str, Any]:
    """A row of MAML with ten points and a rate of 0.01."""
    model = {"order": order, "steps": steps, "inner_lr": 0.01, "lr": 1e-3}
    data = {"tasks_args": {"shot": 10, "query": 10}, "eval_tasks_args": {"query": 100}}
    return {"kind": "MAML", "iterations": iterations, "model": model, "data": data, "expected": expected}


ROWS: dict[str, dict[str, Any]] = {
    "maml_2k": maml(
        2000, order=2, steps=1, step_0=(2.77, None), step_1=(0.815, None), step_5=(0.458, None), step_10=(0.372, None)
    ),
    "maml_15k": maml(
        15000, order=2, steps=1, step_0=(2.77, None), step_1=(0.387, 0.036), step_5=(0.141, None), step_10=(0.106, None)
    ),
    "fomaml_15k": maml(15000, order=1, steps=1, step_1=(0.545, None), step_5=(0.195, None), step_10=(0.134, None)),
    "maml_5_steps_15k": maml(
        15000, order=2, steps=5, step_1=(0.581, None), step_5=(0.099, 0.013), step_10=(0.073, None)
    ),
    "fomaml_5_steps_15k": maml(
        15000, order=1, steps=5, step_1=(2.307, None), step_5=(0.664, 0.112), step_10=(0.470, None)
    ),
    "reptile_30k": {
        "kind": "Reptile",
        "iterations": 30000,
        "model": {"steps": 5, "inner_lr": 0.02, "inner_batch": 10, "lr": 0.1, "eval_steps": [8, 32]},
        "data": {
            "tasks_args": {"shot": 50, "grid": 50, "max_phase": 6.283185307179586},
            "eval_tasks_args": {"shot": 10},
            "batch_size": 1,
        },
        "expected": {"step_8": (0.105, 0.015), "step_32": (0.112, None)},
    },
}


def keys() -> dict[str, tuple[str, int]]:
    """Key -> (row, seed): the longest rows begin first, and all rows with the first seed before another."""
    longest = sorted(ROWS, key=lambda name: -ROWS[name]["iterations"] * ROWS[name]["model"]["steps"])
    return {f"{name}|{seed}": (name, seed) for seed in SEEDS for name in longest}


def cell(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Trains one row and measures it on 600 tasks; goes on where another process was stopped.

    Args:
        name: of the row.
        seed: of weights and tasks.
        work: the folder of checkpoints.
    """
    row, begin = ROWS[name], time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    batch = row["data"].get("batch_size", BATCH)
    data = EpisodeData(
        tasks=TASKS,
        **{"batch_size": batch, **row["data"]},
        episodes=batch * row["iterations"],
        val_episodes=EVALUATED,
        val_batch_size=EVALUATED,
    )
    if row["kind"] == "MAML":
        module: Any = MAML(net=MLP([1, 40, 40, 1]), **row["model"])
    else:
        module = Reptile(net=MLP([1, 64, 64, 1], "tanh"), **row["model"])
    folder = work / f"{name}_{seed}"
    saver = ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_last=True, save_top_k=0)
    trainer = quiet_trainer(saver, max_epochs=1, enable_checkpointing=True, folder=folder)
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    found = {key.removeprefix("val/"): float(value) for key, value in trainer.callback_metrics.items()}
    kept = {key: round(value, 5) for key, value in found.items() if key == "loss" or key.startswith("step_")}
    return {"scores": kept, "seconds": time.perf_counter() - begin, "expected": row["expected"]}


def quiet_trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    """A Trainer on the processor that says and writes nothing."""
    return silent_trainer(callbacks=callbacks, **{"accelerator": "cpu", "num_sanity_val_steps": 0, **options})


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    from lightning_ft.models import starter

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.meta_sinusoid", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--speed", action="store_true", help="measure a step beside plain loops instead of the cells")
    parser.add_argument("--steps", type=int, default=300, help="of a measurement of --speed")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--render", action="store_true", help="write the tables from the kept results and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "meta_sinusoid.json")
    parser.add_argument("--work", type=Path, default=None, help="folder of checkpoints; by default one in the cache")
    parser.add_argument("--cell", default=None, help="run this one here, and print its result")
    arguments = parser.parse_args(argv)
    work = arguments.work or starter.cache_folder() / "meta_sinusoid"
    vader_cells.quiet()
    torch.set_num_threads(1)
    if arguments.cell:
        name, seed = keys()[arguments.cell]
        print(json.dumps(cell(name, seed, work)))
        return
    kept = Kept(arguments.output, SETTING, arguments.only)
    if arguments.speed:
        from benchmarks.meta_speed import speed

        kept.content["speed"] = speed(arguments.steps, arguments.rounds)
        kept.save()
    elif not arguments.render:
        words = {key: ["--cell", key, "--work", str(work)] for key in keys()}
        run_cells(kept, "benchmarks.meta_sinusoid", words, score="loss", jobs=arguments.jobs)
    meta_report.write(arguments.output, RESULTS)


if __name__ == "__main__":
    main()
