"""Small streams for tests: three tasks of points in a plane, of different sizes, and a module with one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.data.task_stream import TaskStream

SIZES = {"a": 10, "b": 6, "c": 9}
EPOCHS = [1, 2, 1]


class Points(LightningDataModule):
    """Points of one task with one of three classes each."""

    def __init__(self, seed: int, rows: int, batch_size: int = 4, shuffle: bool = True) -> None:
        super().__init__()
        self.seed, self.rows, self.batch_size, self.shuffle = seed, rows, batch_size, shuffle

    def points(self) -> TensorDataset:
        drawn = torch.Generator().manual_seed(self.seed)
        return TensorDataset(
            torch.randn(self.rows, 4, generator=drawn), torch.randint(0, 3, (self.rows,), generator=drawn)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.points(), batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.points(), batch_size=self.batch_size)


class Layer(LightningModule):
    """A user's own module: plain tensors, a mean loss, a schedule by epochs."""

    def __init__(self, rate: float = 0.05) -> None:
        super().__init__()
        self.rate, self.rates, self.seen = rate, [], []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.seen.append(batch[0][:, 0].tolist())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        right = (self.net(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_acc", right, batch_size=len(batch[0]), sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Hooks(Callback):
    """What was called, and what a checkpoint keeps of it."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: Any) -> None:
        self.calls.append(["start", task.name, task.index, trainer.global_step])

    def on_task_end(self, trainer: Trainer, module: LightningModule, task: Any) -> None:
        self.calls.append(["end", task.name, task.index, trainer.global_step])

    def state_dict(self) -> dict[str, Any]:
        return {"calls": [list(call) for call in self.calls]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = [list(call) for call in state_dict["calls"]]


class Saves(Callback):
    """A checkpoint each time a hook is called, ``HOOK-NUMBER.ckpt``; placed after all other callbacks."""

    def __init__(self, folder: Path, *hooks: str) -> None:
        self.folder, self.counts = folder, dict.fromkeys(hooks, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.callbacks.remove(self)
        trainer.callbacks.append(self)

    def _save(self, hook: str, trainer: Trainer) -> None:
        if hook in self.counts and not trainer.sanity_checking:
            self.counts[hook] += 1
            trainer.save_checkpoint(self.folder / f"{hook}-{self.counts[hook]}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save("batch", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._save("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save("epoch", trainer)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self._save("end", trainer)


def stream(**options: Any) -> TaskStream:
    tasks = {name: Points(number, rows) for number, (name, rows) in enumerate(SIZES.items())}
    return TaskStream(tasks, **{"epochs": EPOCHS, **options})


def trainer(folder: Path | str, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
