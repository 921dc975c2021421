"""The ground that all invariants are tested on: SFT + SFTData + LoRA on a random Llama of two layers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.data.sft_data import SFTData
from lightning_ft.engine.attachment import Attachment
from lightning_ft.modules.sft import SFT
from lightning_ft.nn.registry import injected_layers

ROWS = 20


def write_rows(file: Path, rows: int = ROWS) -> Path:
    """Conversations of very uneven lengths, so that a mean of means is far from the mean."""
    words = random.Random(1)
    lines = []
    for number in range(rows):
        question = "".join(words.choices("abcdefgh ", k=words.randint(1, 20))) + str(number)
        answer = "".join(words.choices("stuvwxyz ", k=words.randint(1, 25))) + "."
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": chat}) + "\n")
    file.write_text("".join(lines))
    return file


def sft(base: Path | str, **options: Any) -> SFT:
    """The module with fp32 weights and plain SGD, whose steps do not blow rounding up as Adam's division does."""
    settings: dict[str, Any] = {"lr": 0.05, "warmup_steps": 0, "schedule": "constant", "base_dtype": "float32"}
    return SFT(str(base), **{**settings, "optimizer": torch.optim.SGD, **options})


def data(rows: Path | str, cache: Path | str, **options: Any) -> SFTData:
    """Batches of two rows unless said otherwise."""
    return SFTData(str(rows), cache_dir=str(cache), **{"batch_size": 2, "seed": 3, **options})


def trainer(folder: Path | str, *callbacks: Callback, **options: Any) -> Trainer:
    """A silent Trainer on the CPU for one epoch."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "default_root_dir": str(folder),
        "max_epochs": 1,
        "limit_val_batches": 0,
    }
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))


def stir_(model: torch.nn.Module, seed: int = 7, scale: float = 0.1) -> None:
    """Gives every injected parameter seeded random values: a zero B would hide the gradient of A."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in sorted(injected_layers(model).items()):
            for _, parameter in sorted(layer.injected_parameters().items()):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def built(base: Path | str, *techniques: Any, **options: Any) -> SFT:
    """SFT with techniques injected and stirred, without a Trainer."""
    module = sft(base, **options)
    Attachment.of(module).rebuild(list(techniques), seed=0)
    stir_(module)
    return module


class Stir(Callback):
    """Stirs the factors before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        stir_(pl_module)


class Windows(Callback):
    """Records loss, gradients, divisor and rows of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grads: list[dict[str, torch.Tensor]] = []
        self.totals: list[float] = []
        self.rows: list[list[int]] = [[]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows[-1] += [row for row in batch.rows.tolist() if row >= 0]
        self.total = batch.window["token"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.grads.append({n: p.grad.detach().clone() for n, p in named if p.requires_grad})
        self.totals.append(self.total)
        self.rows.append([])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if len(self.losses) < len(self.grads):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def measure(
    base: str, rows: str, folder: str, *, data_options: dict[str, Any], trainer_options: dict[str, Any]
) -> dict[str, Any]:
    """One epoch; what `Windows` saw and the final factors. Both ranks of `two_ranks` call this too."""
    torch.set_num_threads(1)
    windows = Windows()
    module = sft(base)
    run = trainer(folder, LoRA(r=4), Stir(), windows, **trainer_options)
    run.fit(module, data(rows, Path(folder) / "cache", **data_options))
    final = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    return {
        "losses": windows.losses,
        "grads": windows.grads,
        "totals": windows.totals,
        "rows": [sorted(rows) for rows in windows.rows[:-1]],
        "final": final,
    }
