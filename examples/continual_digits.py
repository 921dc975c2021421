"""Two digits after two: what a net keeps of the first ones with nothing against forgetting, with replay, and at best.

python examples/continual_digits.py

The module knows nothing of this library: an own net, an own loss. The stream cuts scikit-learn's digits by class; the net may
answer with any of the ten digits at any time, so that without help it soon knows the last two alone.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import Replay, TaskStream


class Digits(pl.LightningDataModule):
    """8 x 8 pixels in 64 numbers; every fifth row is held out."""

    def __init__(self) -> None:
        super().__init__()
        pixels, digits = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
        held = torch.arange(len(x)) % 5 == 0
        self.train, self.val = TensorDataset(x[~held], y[~held]), TensorDataset(x[held], y[held])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In a new order each epoch."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.val, batch_size=256)


class Net(pl.LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over all ten."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy; the stream runs it once for each task."""
        right = (self.net(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_acc", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Begun anew with each task."""
        return torch.optim.Adam(self.parameters(), 5e-3)


def main(epochs: int = 5) -> dict[str, dict[str, float]]:
    """Trains three times; what is left in each case, and the matrix of the run with replay on the screen."""
    found = {}
    for name, techniques, baseline in (
        ("naive", [], None),  # with nothing against forgetting
        ("replay", [Replay(200, balance="class")], None),
        ("joint", [], "joint"),  # all digits at once
    ):
        pl.seed_everything(0)
        stream = TaskStream(
            source=Digits(), by="class", groups=2, scenario="class", epochs=epochs, metric="val_acc", baseline=baseline
        )
        trainer = pl.Trainer(
            callbacks=techniques,
            max_epochs=-1,  # the stream knows how many
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(Net(), stream)
        found[name] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("continual/")}
        if name == "replay":
            rows, _ = stream.scores.matrix()
            print("columns:", *stream.scores.columns())
            for task, row in zip(stream.scores.rows, rows, strict=True):
                print(f"after {task}:", *(f"{value:.2f}" for value in row))
        print(name, {k.removeprefix("continual/"): round(v, 3) for k, v in found[name].items()})
    return found


if __name__ == "__main__":
    main()
