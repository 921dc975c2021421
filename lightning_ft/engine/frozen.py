"""A model that computes beside the one that is trained: a teacher, a reward model.

It is held outside the module tree, so that it is in no ``parameters()``, checkpoint, optimizer or DDP bucket, and Lightning's
``train()`` does not reach it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.dtype import apply_dtype_policy


class Frozen:
    """Holds a module in eval mode, without gradients, in its own dtype."""

    def __init__(
        self, module: nn.Module, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Takes the module over.

        Args:
            module: with its weights, packed or not; nobody else trains or moves it from here on.
            device: where it computes.
            dtype: of its weights; None leaves each as it is. Packed weights stay packed.

        Raises:
            Refusal: its values are not loaded.
        """
        if any(p.is_meta for p in module.parameters()):
            raise Refusal(f"{type(module).__name__} has no values yet (meta device); load them before it is frozen.")
        module.eval().requires_grad_(False)
        if dtype is not None:
            apply_dtype_policy(module, dtype)
        self._module = module.to(device)

    @property
    def module(self) -> nn.Module:
        """The module itself, to look at."""
        return self._module

    @contextmanager
    def computing(self) -> Iterator[nn.Module]:
        """Inside, the module computes: without gradients and in its own dtype, whatever surrounds it."""
        device = next((p.device for p in self._module.parameters()), torch.device("cpu"))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        with self.computing() as module:
            return module(*args, **kwargs)


__all__ = ["Frozen"]
