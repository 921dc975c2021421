"""Nets whose passes over one row are of one function: nothing drops at random, and that it does not is tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import PackedLayer


@contextmanager
def nothing_dropped(net: nn.Module) -> Iterator[None]:
    """Inside, a net that trains runs in evaluation mode: ``F.dropout(x, p, self.training)``, stochastic depth and the like rest.

    Norms keep their mode, which says whether they take the statistics of the batch; so do packed layers, whose backward asks it.
    """
    switched = [part for part in net.modules() if part.training and not isinstance(part, (_NormBase, PackedLayer))]
    for part in switched:
        part.training = False
    try:
        yield
    finally:
        for part in switched:
            part.training = True


@torch.no_grad()
def refuse_chance(module: nn.Module, inputs: Any) -> None:
    """Refuses a module that gives two answers for the same rows.

    Args:
        module: as it is called in a step.
        inputs: rows; what the passes write into buffers is forgotten.

    Raises:
        Refusal: ``MAML differentiates through several passes over one row, and two of them differ by up to 0.8; ...``
    """

    def passed() -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        outputs: Tensor = functional_call(module, buffers, (inputs,))
        return outputs.float()

    first, second = passed(), passed()
    away = (first - second).abs().max().item() if first.numel() else 0.0
    # Kernels that add in any order differ in the last digits, and those of half precision have two or three in all.
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    coarse = half or torch.is_autocast_enabled(first.device.type)
    if away > (0.03 if coarse else 1e-3) * first.abs().max().item():
        raise Refusal(
            f"{type(module).__name__} takes several passes over one row, which must be of one function, and two of them differ by "
            f"up to {away:.2g}; take dropout and whatever else is drawn at random out of the net's forward, or bind it to "
            "self.training."
        )


__all__ = ["nothing_dropped", "refuse_chance"]
