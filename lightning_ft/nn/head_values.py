"""Any function of single rows of logits, summed up to one number a token, without ever holding a batch of logits.

`lightning_ft.nn.head` scores labels that are given. Here a caller's function sees each chunk's logits and says a value for
each row and how it changes with them, so that labels can be drawn from the model's own distribution on the way, at the price of no
further matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_ft.nn.head import WithSlope, chunk_on

RowValues = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits (n, V) without a graph, which rows they are) -> (value (n,), d value / d logits (n, V))."""


def head_values(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    values: RowValues,
    *,
    recompute: bool,
    around: Callable[[slice], AbstractContextManager[None]],
    chunk_size: int | None = None,
) -> Tensor:
    """One value for each hidden state, differentiable in it and in the head.

    Args:
        hidden: (N, D); N may be 0.
        head: maps (n, D) to logits (n, V); called a chunk at a time, and once more in backward where it is trained.
        values: what is made of each chunk's logits; asked twice for the same chunk where the head is trained, and has to say the
            same then.
        recompute: whether something in the head is trained, or FSDP2 has made it a unit of its own.
        around: entered around each call of the head in the forward pass.
        chunk_size: tokens whose logits exist at one time, see `lightning_ft.nn.head.score_tokens`.

    Returns:
        (N,), fp32 or above.
    """
    if not len(hidden):
        return hidden.sum(-1).float() + 0.0 * head(hidden.new_zeros(1, hidden.shape[1])).sum().float()
    parts: list[Tensor] = []
    chunk_size = chunk_on(hidden.device) if chunk_size is None else chunk_size
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, min(start + chunk_size, len(hidden)))
        with around(rows):
            of = _recomputed if recompute else _kept
            parts.append(of(hidden[rows], rows, head, values))
    return torch.cat(parts)


def _recomputed(chunk: Tensor, rows: slice, head: Callable[[Tensor], Tensor], values: RowValues) -> Tensor:
    def run(chunk: Tensor) -> Tensor:
        logits = head(chunk)
        with torch.no_grad():
            value, slope = values(logits.detach(), rows)
        return WithSlope.apply(logits, value, slope)

    found: Tensor = checkpoint(run, chunk, use_reentrant=False)
    return found


def _kept(chunk: Tensor, rows: slice, head: Callable[[Tensor], Tensor], values: RowValues) -> Tensor:
    with torch.enable_grad():
        leaf = chunk.detach().requires_grad_()
        logits = head(leaf)
    with torch.no_grad():
        value, slope = values(logits.detach(), rows)
    (pulled,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
    return WithSlope.apply(chunk, value, pulled)
