"""A model that is only asked: reward models, teachers.

It hangs on a module without being a part of it: its weights are in no ``parameters()``, checkpoint, optimizer, DDP bucket or
FSDP2 shard, nothing trains it, and techniques that inject or freeze by name never see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Frozen(Generic[Model]):
    """Holds a model that was loaded elsewhere, or loads it when it is first asked.

    Being no ``nn.Module`` itself, it is an ordinary attribute to a module that keeps it. A copied module shares it.
    """

    def __init__(self, model: Model | Callable[[], Model]) -> None:
        """Args: model: the model, or what loads it."""
        self._load: Callable[[], Model] | None = None
        self._model: Model | None = None
        if isinstance(model, nn.Module):
            self._model = self._quiet(cast("Model", model))
        else:
            self._load = model

    @staticmethod
    def _quiet(model: Model) -> Model:
        model.requires_grad_(False)
        model.eval()
        return model

    @property
    def model(self) -> Model:
        """The model, where it is, in eval mode and with nothing to train."""
        if self._model is None:
            assert self._load is not None
            self._model = self._quiet(self._load())
        return self._model

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
