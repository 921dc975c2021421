"""Small episodes of sine waves and of words, and fits on them."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_ft
from lightning_ft import EpisodeData, LoRA
from lightning_ft.nn.small_nets import MLP
from tests.contract.subjects import Steps, trainer
from tests.modules.tasks import WORDS

SINES = "lightning_ft.data.sinusoids.sinusoids"


def mlp(seed: int = 0) -> MLP:
    """1-6-6-1 with tanh, so that finite differences are smooth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP([1, 6, 6, 1], "tanh")


def sines(**options: Any) -> EpisodeData:
    """Eight tasks an epoch of four and three points, all in one micro-batch."""
    given = {"batch_size": 8, "episodes": 8, "val_episodes": 6, "seed": 3, **options}
    return EpisodeData(tasks=SINES, tasks_args={"shot": 4, "query": 3}, **given)


def module(kind: str = "MAML", **options: Any) -> Any:
    """A module over the small net, plain outer steps."""
    given: dict[str, Any] = {"net": mlp(), "steps": 2, "inner_lr": 0.1, "lr": 0.05, "schedule": "constant"}
    return getattr(lightning_ft, kind)(**{**given, "optimizer": torch.optim.SGD, **options})


def fit(folder: Path, made: Any, data: Any, *callbacks: Any, **options: Any) -> tuple[Steps, Any]:
    """(what each step was, the trainer)."""
    steps = Steps()
    runner = trainer(folder, steps, *callbacks, **{"limit_val_batches": 0, "max_epochs": 3, **options})
    runner.fit(made, data)
    return steps, runner


def write_words(folder: Path, classes: int = 8, rows: int = 9) -> Path:
    """A CSV of short sentences whose class is told by their words' order, mostly."""
    draw = random.Random(0)
    path = folder / "words.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for k in range(classes):
            for n in range(rows):
                words = [WORDS[k]] * 3 + [draw.choice(WORDS) for _ in range(1 + n % 4)]
                table.writerow([" ".join(words), f"class {k}"])
    return path


def words(path: Path, folder: Path, **options: Any) -> EpisodeData:
    """Three classes of two and three rows."""
    given: dict[str, Any] = {"way": 3, "shot": 2, "query": 3, "val_classes": 3, "batch_size": 2, "episodes": 4}
    given |= {"val_episodes": 4, "seed": 5, "cache_dir": str(folder / "cache"), "small_classes": "drop", **options}
    return EpisodeData(str(path), **given)


def on_ranks(
    folder: str, kind: str, devices: int, model: dict[str, Any], episodes: int = 8, a_step: int = 8, accumulate: int = 1
) -> Any:
    """(metrics, trained weights) of three steps of ``a_step`` tasks on one rank or on each of two."""
    torch.set_num_threads(1)
    data = sines(batch_size=a_step // devices // accumulate, val_batch_size=2, episodes=episodes)
    ranks: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    ranks["accumulate_grad_batches"] = accumulate
    made = module(kind, **model)
    _, runner = fit(Path(folder), made, data, max_steps=3, limit_val_batches=None, **ranks)
    measured = {name: float(value) for name, value in runner.callback_metrics.items()}
    return measured, {name: p.detach().clone() for name, p in made.named_parameters()}


def text_on_ranks(base: str, path: str, folder: str, devices: int) -> Any:
    """The same of MAML over LoRA on words."""
    torch.set_num_threads(1)
    data = words(Path(path), Path(folder), batch_size=4 // devices, val_batch_size=2)
    ranks: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    made = lightning_ft.MAML(
        base, inner="adapter_and_head", inner_lr=0.5, steps=2, lr=0.1, optimizer=torch.optim.SGD, eval_steps=[0]
    )
    _, runner = fit(Path(folder), made, data, LoRA(r=2), max_steps=2, limit_val_batches=None, **ranks)
    measured = {name: float(value) for name, value in runner.callback_metrics.items()}
    return measured, {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


class Normed(nn.Module):
    """A net that `torch.vmap` cannot map: its forward asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if float(x.detach().sum()) < 1e9 else x
