"""Few-shot classification of images with a net of your own: rotated digits, five classes from one example each.

    python examples/few_shot_images.py

The digits of scikit-learn are written as a folder with one folder for each class, as your images may lie: ten digits in four
rotations are forty classes. MAML adapts the net's head (ANIL); the start that it learned is compared with the start it began
from, on classes that it has never seen.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_ft import MAML, EpisodeData


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(S, 1, 8, 8) -> (S, 5)."""
        out: Tensor = self.head(self.body(x))
        return out


def write_digits(folder: Path) -> None:
    """Forty folders of tensors; with images of your own, Pillow reads them instead."""
    digits = load_digits()
    for turn in range(4):
        for k in range(10):
            target = folder / f"{k} turned {90 * turn}"
            target.mkdir(parents=True)
            for n, image in enumerate(digits.images[digits.target == k][:30]):
                np.save(target / f"{n}.npy", np.rot90(image / 16, turn)[None].astype(np.float32))


def main(episodes: int = 2000, test_episodes: int = 200) -> dict[str, float]:
    """Accuracy with one example of each of five new classes, before and after meta-training."""
    pl.seed_everything(0, verbose=False)
    with TemporaryDirectory() as folder:
        write_digits(Path(folder))
        data = EpisodeData(
            folder,
            way=5,
            shot=1,
            query=5,
            test_classes=12,
            episodes=episodes,
            test_episodes=test_episodes,
            val_batch_size=50,
        )
        module = MAML(net=Net(), inner="head", steps=3, inner_lr=0.4, lr=2e-3, eval_steps=[])
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            enable_progress_bar=False,
        )
        (before,) = trainer.test(module, data, verbose=False)
        trainer.fit(module, data)
        (after,) = trainer.test(module, data, verbose=False)
    found = {
        "before": before["test/accuracy"],
        "after": after["test/accuracy"],
        "interval": after["test/accuracy_ci95"],
    }
    print(" ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
