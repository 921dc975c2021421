"""LoRA on a small convolutional network: learn the digits 0 to 4, then all ten through factors alone.

    python examples/lora_on_a_cnn.py

Nothing here is a language model. The data are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (no download).
The convolutions get factors as linear layers do; the last layer, which has never seen five of the classes, is trained
in full (`modules_to_save`). It prints test accuracies of all ten and of the first five digits, before and after.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import LoRA


class DigitCNN(pl.LightningModule):
    """Two convolutions, one hidden layer, ten outputs."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),  # (B, 16, 8, 8)
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),  # (B, 32, 4, 4)
            nn.ReLU(),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) -> logits (B, 10)."""
        logits: Tensor = self.classifier(torch.relu(self.hidden(self.features(images))))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, digits = batch
        return nn.functional.cross_entropy(self(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What requires a gradient: everything in the first fit, factors and classifier in the second."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def split() -> tuple[TensorDataset, TensorDataset]:
    """Training and test digits, the last fifth of the file for testing (other people wrote those)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), from 0 to 1
    labels = torch.tensor(digits.target)
    cut = len(labels) * 4 // 5
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


def fit(module: DigitCNN, data: TensorDataset, epochs: int, *callbacks: pl.Callback) -> None:
    """One fit with what the callbacks leave trainable."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True, num_workers=0))


@torch.no_grad()
def accuracy(module: DigitCNN, data: TensorDataset, only_below: int = 10) -> float:
    """Share of the digits below ``only_below`` that are recognised."""
    images, labels = data.tensors
    chosen = labels < only_below
    module.eval()
    share = float((module(images[chosen]).argmax(-1) == labels[chosen]).float().mean())
    module.train()
    return share


def main(*, epochs: int = 30, r: int = 4) -> dict[str, float]:
    """Trains twice and returns accuracies on test digits, and how much the second fit trained."""
    pl.seed_everything(0)
    train, test = split()
    images, labels = train.tensors
    first_five = TensorDataset(images[labels < 5], labels[labels < 5])

    module = DigitCNN()
    fit(module, first_five, epochs)
    result = {"all ten, before": accuracy(module, test), "0 to 4, before": accuracy(module, test, 5)}
    kernel = module.features[0].weight.detach().clone()

    fit(module, train, epochs, LoRA(r, target=["features.*", "hidden"], modules_to_save=["classifier"]))
    result |= {"all ten, after": accuracy(module, test), "0 to 4, after": accuracy(module, test, 5)}

    frozen = {name: p for name, p in module.named_parameters() if name.endswith("weight") and not p.requires_grad}
    assert any(torch.equal(weight, kernel) for weight in frozen.values()), (
        "LoRA never writes to the weights it is beside"
    )
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {**result, "trained share": trained / sum(p.numel() for p in parameters)}


if __name__ == "__main__":
    for what, value in main().items():
        print(f"{what:<16} {value:.3f}")
