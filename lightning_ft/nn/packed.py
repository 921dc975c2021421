"""Linear layers whose weight is stored in 4 or 8 bits: what the rest of the library knows of them without bitsandbytes.

The layers themselves are in `lightning_ft.nn.packed_linear`, which is imported only where something is packed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SAMPLES = 4096


@dataclass(frozen=True)
class Sample:
    """What a fingerprint reads of one tensor: its shape and at most 4,096 of its numbers, at even distances, in bfloat16.

    A float32 and a bfloat16 copy of one weight have the same sample.
    """

    shape: tuple[int, ...]
    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        """Takes the sample of a tensor on any device."""
        flat = tensor.detach().reshape(-1)
        numbers = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu()
        if numbers.is_floating_point():
            numbers = numbers.to(torch.bfloat16).view(torch.int16)
        return cls(tuple(tensor.shape), numbers.contiguous().clone())


class PackedLayer(nn.Module):
    """A linear layer that stores a packed weight and multiplies by what it stands for; it has no gradient of its own.

    Attributes:
        mode: How it is packed, e.g. ``nf4``.
        source: Sample of the weight before it was packed, as the original layer stored it: checkpoints know the base by it.
        source_dtype: Dtype of that weight.
        stored_as_inputs_first: Whether the original layer stored its weight as (in, out), as GPT-2's ``Conv1D`` does.
    """

    mode: str
    source: Sample
    source_dtype: torch.dtype
    stored_as_inputs_first: bool

    def dense(self) -> Tensor:
        """Return the weight that the packed one stands for, in the shape and dtype of the original: (out, in), or (in, out)."""
        raise NotImplementedError

    def packed_bytes(self) -> int:
        """Return the bytes that the weight takes, its scales included."""
        raise NotImplementedError

    def packed_numbers(self) -> int:
        """Return how many numbers the weight stands for."""
        return int(self.in_features) * int(self.out_features)  # type: ignore[arg-type]


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Import bitsandbytes in this block: its CPU backend would fetch a compiled kernel from the hub and run it.

    It does so where the package ``kernels`` is installed, and logs a warning where it is not. The kernel serves the very
    path that `lightning_ft.nn.packed_linear` avoids.
    """
    logger, name = logging.getLogger("bitsandbytes.backends.cpu.ops"), "kernels"
    level, present = logger.level, sys.modules.get(name)
    logger.setLevel(logging.ERROR)
    sys.modules[name] = None  # type: ignore[assignment]  # so that an import of it fails
    try:
        yield
    finally:
        logger.setLevel(level)
        if present is None:
            del sys.modules[name]
        else:
            sys.modules[name] = present


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model that this library made, by their present path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def is_packed(weight: Tensor) -> bool:
    """Say whether a weight is stored quantised, so that its tensor is not the matrix that it stands for."""
    return hasattr(weight, "quant_state") or not weight.dtype.is_floating_point


def has_packed_weights(model: nn.Module) -> bool:
    """Say whether any parameter of a model is stored quantised, by this library or by another."""
    return any(is_packed(p) for p in model.parameters())


__all__ = ["PackedLayer", "Sample", "has_packed_weights", "is_packed", "packed_layers", "without_hub_kernels"]
