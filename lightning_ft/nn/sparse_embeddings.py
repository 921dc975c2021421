"""Sparse gradients of embeddings, for steps that change the few rows that were looked up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def sparse_embeddings(module: nn.Module) -> Iterator[None]:
    """Makes the gradients of embeddings that are looked up within sparse: as many rows as tokens, not as the vocabulary.

    On a CPU, where most of a small encoder's inner step went into rows that no text of a task holds. On a GPU they stay dense, for
    to sort rows is to wait for the device; so do those of a tied head, which has a gradient in every row, and sharded ones.

    Args:
        module: whose embeddings; all are as before on leaving.
    """
    changed = [
        part
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        and not (part.sparse or part.scale_grad_by_freq)
        and part.weight.device.type == "cpu"
        and not isinstance(part.weight, DTensor)
    ]
    for part in changed:
        part.sparse = True
    try:
        yield
    finally:
        for part in changed:
            part.sparse = False


__all__ = ["sparse_embeddings"]
