"""Throughput counts real tokens of the batches after the warm-up, and writes the fit's figures."""

import json
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ft.callbacks.throughput import Throughput
from lightning_ft.engine.batch import Batch


def batch(tokens: int) -> Batch:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(ids, ids, (0, tokens), None, nothing, nothing, nothing, nothing, {"token": 0.0, "row": 1.0})


class Sleeper(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.constant = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def training_step(self, one: Batch, batch_idx: int) -> torch.Tensor:
        time.sleep(0.3 if batch_idx == 0 else 0.05)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_warm_up_does_not_count(tmp_path: Path) -> None:
    loader = DataLoader([batch(1000), batch(10), batch(30)], batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Throughput(warmup=1)],
    )
    trainer.fit(Sleeper(), loader)
    figures = json.loads((tmp_path / "throughput.json").read_text())
    # 40 tokens in two batches of at least 0.05 s each; with the first batch it would be above 1000 a second.
    assert 40 < figures["tokens_per_second"] <= 40 / 0.1
    assert figures["train_seconds"] >= 0.4
    assert (figures["trainable_parameters"], figures["parameters"]) == (1, 4)
    assert figures["optimizer_steps"] == 3
    assert trainer.callback_metrics["train/tokens_per_second"] == pytest.approx(figures["tokens_per_second"])
