"""Small classes with the shape of the real ones, so that the command line is tested without a language model."""

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal


class TinyModule(LightningModule):
    """A linear layer that learns to be zero."""

    built: ClassVar[int] = 0  # how many models were built: bad input must leave it at 0

    def __init__(
        self,
        base: str,
        *,
        lr: Annotated[float, Gt(0)] | None = None,
        warmup_steps: Annotated[int, Ge(0)] = 0,
        dtype: Literal["auto", "fp32"] = "auto",
    ) -> None:
        """Stores; the model is built in `configure_model`.

        Args:
            base: name of the base; ``missing`` cannot be loaded.
            lr: learning rate.
            warmup_steps: steps until the rate is reached.
            dtype: of the weights.
        """
        super().__init__()
        self.save_hyperparameters()
        self.base, self.lr, self.dtype_ = base, lr, dtype

    def configure_model(self) -> None:
        """Builds."""
        if self.base == "missing":
            raise Refusal("There is no model 'missing'; give a folder, a hub id or starter:NAME.")
        TinyModule.built += 1
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Mean square of the output."""
        if self.base == "ctrl-c" and index == 3:
            raise KeyboardInterrupt
        if self.base == "bug" and index == 1:
            raise RuntimeError("a bug of ours")
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """The same, logged."""
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.layer.parameters(), lr=self.lr or 0.1)


class TinyData(LightningDataModule):
    """Eight rows of two numbers."""

    def __init__(self, path: str, *, batch_size: Annotated[int, Ge(1)] = 2, split: float | str | None = None) -> None:
        """Stores.

        Args:
            path: name of the data; ``missing`` cannot be read.
            batch_size: rows a step.
            split: what is held out.
        """
        super().__init__()
        self.path, self.batch_size, self.split = path, batch_size, split

    def setup(self, stage: str) -> None:
        """Reads."""
        if self.path == "missing":
            raise Refusal("There is no data file missing; give data.path.")
        self.rows = TensorDataset(torch.arange(16.0).reshape(8, 2) / 16)

    def train_dataloader(self) -> DataLoader:
        """All rows in order."""
        return DataLoader(self.rows, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """All rows in order."""
        return DataLoader(self.rows, batch_size=self.batch_size)


class TinyAdapter(Callback):
    """Pretends to train a low-rank part. A second sentence."""

    traits = Traits(slot="tiny", edits=frozenset({"model"}))

    def __init__(
        self,
        r: Annotated[int, Ge(1)] = 8,
        *,
        alpha: Annotated[float, Gt(0)] | None = None,
        targets: str | list[str] = "all-linear",
        init_from: str | None = None,
    ) -> None:
        """Stores.

        Args:
            r: rank.
            alpha: scale.
            targets: which layers.
            init_from: an adapter to start from.
        """
        self.r, self.alpha, self.targets, self.init_from = r, alpha, targets, init_from
        if targets == "refused":
            raise Refusal("TinyAdapter.targets must not be refused.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what its targets say."""
        if self.targets == "nothing":
            raise Refusal("No module matches 'nothing'; the nearest is layer.")
        if self.targets == "misconfigured":
            raise MisconfigurationException("Lightning says\nno.")
