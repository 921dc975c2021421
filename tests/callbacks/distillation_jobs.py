"""Fits with a teacher on one rank or two, for the comparison of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import Distillation, LoRA
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.contract.subjects import CLASSES, FEATURES, PlainNet, Steps, chat_job, loader, rows, trainer
from tests.modules.preference import weights


class Held(pl.Callback):
    """Which share of each of the teacher's tensors lies on this rank, as the first step begins and after the last."""

    def __init__(self, technique: Distillation) -> None:
        self.technique, self.shares = technique, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look()

    def on_train_end(self, trainer, pl_module):
        self.look()

    def look(self) -> None:
        """Notes the shares by name; nothing where the model teaches itself."""
        teacher = self.technique._lesson._teacher
        named = teacher.observer.view.model.named_parameters() if self.technique.teacher != "self" else ()
        self.shares.append(
            {name: (p.to_local().numel() if isinstance(p, DTensor) else p.numel()) / p.numel() for name, p in named}
        )


def on_ranks(
    chat: str, teacher: str, folder: str, devices: int, strategy: str, lora: bool, packing: bool, **arguments: Any
) -> dict[str, Any]:
    """Logged terms and trained weights of three steps of SGD, eight rows a step in all."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"max_steps": 3, "limit_val_batches": 0}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        options |= {"devices": devices, "strategy": given}
    where = Path(folder) / f"{devices}"
    module, data = chat_job(
        Path(chat),
        where,
        model={"lr": 0.05, "optimizer": torch.optim.SGD},
        data={"batch_size": 8 // devices, "packing": packing},
    )
    steps = Steps()
    parts = [LoRA(r=2)] if lora else []
    technique = Distillation(teacher, dtype="float32", **arguments)
    run = trainer(where, *parts, technique, steps, held := Held(technique), **options)
    run.fit(module, data)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if "distillation" in name}
    return {"metrics": metrics, "losses": steps.losses, "weights": weights(module), "held": held.shares}


def deep() -> nn.Sequential:
    """A teacher of the plain net's inputs whose middle repeats itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Sequential(*blocks), nn.Linear(8, CLASSES))


def own_on_ranks(folder: str, devices: int, strategy: str = "auto") -> dict[str, Any]:
    """Trained weights of a module of your own after three steps, four rows a step in all; how the teacher is held."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"max_steps": 3, "limit_val_batches": 0, "use_distributed_sampler": False}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        options |= {"devices": devices, "strategy": given}
    own = slice(torch.distributed.get_rank() if devices > 1 else 0, None, devices)
    net, technique = PlainNet(), Distillation(teacher_module=deep, temperature=2.0)
    found: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            found.append(any(isinstance(p, DTensor) for p in technique._caught._teacher.model.parameters()))

    run = trainer(Path(folder), technique, Look(), **options)
    run.fit(net, DataLoader(TensorDataset(*(x[own] for x in rows())), batch_size=4 // devices), loader())
    return {"weights": weights(net), "divided": found}
