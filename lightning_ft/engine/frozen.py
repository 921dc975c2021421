"""A model that is only asked: reward models, teachers.

It hangs on a module without being a part of it: its weights are in no ``parameters()``, checkpoint, optimizer, DDP bucket or
FSDP2 unit of the module, no ``train()`` reaches it, and techniques that inject or freeze by name never see it. Under FSDP2 it
may have units of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.dtype import apply_dtype_policy
from lightning_ft.models.sharding import shard_frozen_
from lightning_ft.nn.packed import has_packed_weights

Model = TypeVar("Model", bound=nn.Module)


class Frozen(Generic[Model]):
    """Holds a model that was loaded elsewhere, or loads it when it is first asked; in eval mode, with nothing to train.

    Being no ``nn.Module`` itself, it is an ordinary attribute to a module that keeps it. A copied module shares it.

    Attributes:
        divided: whether each rank holds its rows of it, so that all ranks must make equally many passes.
    """

    def __init__(self, model: Model | Callable[[], Model], *, dtype: torch.dtype | None = None) -> None:
        """Takes the model over.

        Args:
            model: the model with its weights, packed or not, or what loads it; nobody else trains or moves it from here on.
            dtype: of its weights; None leaves each as it is. Packed weights stay packed.

        Raises:
            Refusal: its values are not loaded.
        """
        self._dtype, self.divided = dtype, False
        self._load: Callable[[], Model] | None = None
        self._model: Model | None = None
        if isinstance(model, nn.Module):
            self._model = self._quiet(cast("Model", model))
        else:
            self._load = model

    def _quiet(self, model: Model) -> Model:
        if any(p.is_meta for p in model.parameters()):
            raise Refusal(f"{type(model).__name__} has no values yet (meta device); load them before it is frozen.")
        model.requires_grad_(False)
        model.eval()
        if self._dtype is not None:
            apply_dtype_policy(model, self._dtype)
        return model

    @property
    def model(self) -> Model:
        """The model, where it is."""
        if self._model is None:
            assert self._load is not None
            self._model = self._quiet(self._load())
        return self._model

    def spread(self, strategy: Strategy) -> None:
        """Leaves each rank its rows of each block, where the strategy is FSDP2.

        Packed weights stay whole, since FSDP2 cannot divide them.

        Args:
            strategy: of the run.
        """
        if isinstance(strategy, ModelParallelStrategy) and not has_packed_weights(self.model):
            shard_frozen_(self.model, strategy.device_mesh)  # block by block, so that no device holds it whole
            self.model.to(strategy.root_device)
            self.divided = True

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[Model]:
        """The model on a device, where it stays; inside, no gradients, and its own dtypes whatever autocast is on."""
        device = torch.device(device)
        model = self.model
        if any(p.device != device for p in model.parameters()) or any(b.device != device for b in model.buffers()):
            model.to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield model

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[Model]:
        return self


__all__ = ["Frozen"]
