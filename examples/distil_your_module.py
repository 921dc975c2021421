"""Distillation into a LightningModule of your own: nothing in it knows of this library.

Digits of 8 x 8 pixels: a large net learns from 1,000 labelled images, then teaches a small one that sees 100 labels. Images
without a label have the class -1, of which the module's own loss is zero; the teacher has something to say of each.

    python examples/distil_your_module.py
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import Distillation

IMAGES, CLASSES = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
IMAGES = IMAGES.float() / 16


def net(*widths: int) -> nn.Sequential:
    """A classifier of 64 pixels."""
    layers: list[nn.Module] = []
    for before, after in zip((64, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Digits(pl.LightningModule):
    """Your module."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.net = net(*widths)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits, labelled = self.net(batch[0]), batch[1] >= 0
        return nn.functional.cross_entropy(logits[labelled], batch[1][labelled], reduction="sum") / len(labelled)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def fit(module: Digits, classes: Tensor, epochs: int, *callbacks: pl.Callback) -> float:
    """Trains on the first 1,400 images; the share of the other 397 that is right then."""
    rows = TensorDataset(IMAGES[:1400], classes)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(rows, batch_size=100, shuffle=True))
    with torch.no_grad():
        return float((module.net(IMAGES[1400:]).argmax(1) == CLASSES[1400:]).float().mean())


def main(epochs: int = 10) -> dict[str, float]:
    """The accuracy of the teacher, of the student alone, and of the student with its teacher."""
    pl.seed_everything(0)
    hidden = CLASSES[:1400].clone()
    hidden[1000:] = -1
    teacher = Digits(512, 512)
    found = {"teacher": fit(teacher, hidden, epochs)}
    few = hidden.clone()
    few[100:] = -1
    torch.manual_seed(1)
    found["alone"] = fit(Digits(32), few, epochs)
    torch.manual_seed(1)
    taught = Distillation(teacher_module=lambda: teacher.net, student="net", temperature=4.0)
    found["with the teacher"] = fit(Digits(32), few, epochs, taught)
    print(", ".join(f"{name} {accuracy:.3f}" for name, accuracy in found.items()))
    return found


if __name__ == "__main__":
    main()
