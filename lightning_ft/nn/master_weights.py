"""Float32 master weights inside a model that computes in bfloat16.

Adam's steps are often smaller than bfloat16 can add to a weight, so what is trained is kept in float32. A layer whose
neighbours are bfloat16 then needs its weights in bfloat16 while it runs. ``cast_in_forward`` gives a layer just that:
in its forward its own float32 parameters are read as bfloat16 copies, and the gradient flows through the copy to the
master. Names, identity of parameters (tied ones too), state dicts and ``isinstance`` stay as they were.

The layer's class is replaced by a subclass made for it (as torch's parametrisations and FSDP2 do), not its forward by
a closure: a deep copy of the model, which is how teachers and references are made, must not run on the original's
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_master_compute_dtype"


class MasterWeights:
    """Mixed in before a layer's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward with its own parameters read in the compute dtype."""
        assert isinstance(self, nn.Module)
        dtype: torch.dtype = getattr(self, _ATTRIBUTE)
        if isinstance(self, nn.Embedding):
            # Casting the rows that were looked up is the same as looking up in a cast table, without casting the table.
            return _to(super().forward(*args, **kwargs), dtype)  # type: ignore[misc]
        if isinstance(self, nn.Linear):
            # Some models raise activations to the dtype of the weight that comes next, which is the master's.
            args = tuple(_to(a, dtype) for a in args)
        with _read_as(self, dtype):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _read_as(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module's own floating parameters are ``dtype`` copies, connected to the masters, inside the block."""
    masters = {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.is_floating_point() and p.dtype != dtype
    }
    for name, master in masters.items():
        module._parameters[name] = master.to(dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(masters)


@cache
def _subclass(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (MasterWeights, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def cast_in_forward(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a layer read its own parameters as ``dtype`` while it runs. Asked again, only the dtype changes.

    Args:
        module: the layer that owns the parameters directly; nothing happens to its children.
        dtype: what the rest of the model computes in.
    """
    setattr(module, _ATTRIBUTE, dtype)
    if not isinstance(module, MasterWeights):
        module.__class__ = _subclass(cast(Any, type(module)))


def remove_cast(module: nn.Module) -> None:
    """Undo :func:`cast_in_forward`; nothing happens to a layer without it."""
    if not isinstance(module, MasterWeights):
        return
    if type(module).__bases__[:1] == (MasterWeights,):
        module.__class__ = type(module).__bases__[1]
        delattr(module, _ATTRIBUTE)
        return
    raise RuntimeError(
        f"{type(module).__name__} was wrapped again after its master weights were installed; unwrap it first."
    )


def casts(module: nn.Module) -> bool:
    """Whether this layer reads its parameters in a dtype of its own choosing."""
    return isinstance(module, MasterWeights) or bool(getattr(module, "casts_itself", False))
