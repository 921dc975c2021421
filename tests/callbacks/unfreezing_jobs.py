"""What the tests of gradual unfreezing train, on one process or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
from tests.contract.subjects import CLASSES, FEATURES, chat_job, trainer


class Tower(pl.LightningModule):
    """A stem, three blocks, a norm and a head; the user's own module and optimizer."""

    def __init__(self, only_trained: bool = False, fewer: bool = False) -> None:
        super().__init__()
        self.only_trained, self.fewer = only_trained, fewer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Linear(FEATURES, 6)
            self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.stem(batch[0])
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return nn.functional.cross_entropy(self.head(self.norm(hidden)), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters: Any = self.head.parameters() if self.fewer else self.parameters()
        if self.only_trained:
            parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=0.05)


class Watch(pl.Callback):
    """Which parts require a gradient at each backward, and each step's gradients."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, str]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        parts = dict.fromkeys(part(n) for n, p in pl_module.named_parameters() if p.requires_grad)
        self.seen.append((trainer.global_step, trainer.current_epoch, int(len(self.seen)), " ".join(parts)))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({n: getattr(g, "full_tensor", g.clone)() for n, g in grads.items()})


def part(name: str) -> str:
    """The block, or the outermost module that is no container, which a parameter lies in."""
    words = [word for word in name.split(".") if word not in ("model", "net", "weight", "bias")]
    return "".join(words[:2]) if words[0] in ("blocks", "layers") else words[0]


def train(
    chat: str,
    folder: str,
    *,
    batch_size: int = 4,
    accumulate: int = 2,
    steps: int = 7,
    devices: int = 1,
    strategy: str = "ddp",
    resume: str | None = None,
    save: bool = False,
    adam: bool = False,
    unfreezing: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SFT on the tiny chat model; the schedule's steps, gradients and final weights."""
    model: dict[str, Any] = {"lr": 0.05}
    if adam:
        model |= {"optimizer": None, "lr": 0.01, "schedule": "cosine"}
    module, data = chat_job(
        Path(chat), Path(folder) / f"{batch_size}{accumulate}{devices}", data={"batch_size": batch_size}, model=model
    )
    watch = Watch()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_steps": steps, "max_epochs": -1}
    options |= {"use_distributed_sampler": False, "limit_val_batches": 0}
    if devices > 1:
        options |= {"devices": devices, "strategy": chosen(strategy)}
    techniques: list[Any] = [GradualUnfreezing(**(unfreezing or {"every": 2, "unit": "step"})), watch]
    if save:
        keep = ModelCheckpoint(Path(folder) / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
        techniques.append(keep)
        options["enable_checkpointing"] = True
    run = trainer(Path(folder), *techniques, **options)
    run.fit(module, data, ckpt_path=resume)
    weights = {n: getattr(p.detach(), "full_tensor", p.detach().clone)() for n, p in module.named_parameters()}
    return {
        "seen": watch.seen,
        "gradients": watch.gradients,
        "weights": weights,
        "optimizer": run.optimizers[0].state_dict() if devices == 1 else {},
        "world": run.world_size,
    }


def chosen(strategy: str) -> Any:
    """A strategy by name, over gloo."""
    if strategy == "fsdp2":
        from lightning_ft.engine.strategies import FSDP2Strategy

        return FSDP2Strategy(process_group_backend="gloo")
    return strategy
