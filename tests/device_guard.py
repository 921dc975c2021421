"""Finds on a CPU what would fail on a GPU: tensors made without a device while a model is configured.

Lightning calls ``configure_model`` with the strategy's device as torch's default one, so that ``torch.zeros(3)`` in it lies on the
GPU, and ``torch.randn(3, generator=g)`` with a generator of the CPU fails. On a CPU nothing of that shows. So each fit of
the tests configures its model under a mode in which a line of this library that lets torch choose the device is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies.strategy import Strategy
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import lightning_ft

OURS = str(Path(lightning_ft.__file__).parent)


class NamesItsDevice(TorchFunctionMode):
    """Refuses a call of a factory of tensors, by a line of the library, that names no device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(OURS):
                raise AssertionError(
                    f"{frame.f_code.co_filename}:{frame.f_lineno} calls torch.{func.__name__} without a device while a model is "
                    "configured: on a GPU the tensor would lie there; name the device."
                )
        return func(*args, **kwargs)


def guarded() -> Callable[[], None]:
    """Lets every strategy configure its model under the mode; returns what undoes it."""
    original = Strategy.tensor_init_context

    @contextmanager
    def tensor_init_context(self: Strategy, empty_init: bool | None = None) -> Iterator[None]:
        with original(self, empty_init), NamesItsDevice():
            yield

    Strategy.tensor_init_context = tensor_init_context  # type: ignore[method-assign]
    return lambda: setattr(Strategy, "tensor_init_context", original)


__all__ = ["NamesItsDevice", "guarded"]
