"""Fits with a teacher on one rank or two, for the comparison of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_ft import Distillation, LoRA
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.contract.subjects import Steps, chat_job, trainer
from tests.modules.preference import weights


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
    run = trainer(where, *parts, Distillation(teacher, dtype="float32", **arguments), steps, **options)
    run.fit(module, data)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if "distillation" in name}
    return {"metrics": metrics, "losses": steps.losses, "weights": weights(module)}
