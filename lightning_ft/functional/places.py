"""Places for added tokens: something laid before each row or segment, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Bounds = tuple[int, ...] | None
"""Cumulative bounds (0, ..., T) of a packed row's segments; None where each row is one."""


def lay(
    x: Tensor, front: Callable[[Tensor], Tensor], bounds: Bounds = None, pads: Tensor | None = None, *, axis: int = -1
) -> Tensor:
    """Lay something before each segment.

    Args:
        x: Any tensor with an axis of T tokens.
        front: From a segment to what stands before it, P tokens.
        bounds: Where segments end; None for one.
        pads: (B,), how many fillers each row begins with; they stay in front. None is none.
        axis: The axis of tokens; rows are the one before.

    Example:
        >>> lay(torch.tensor([1, 2, 3]), lambda segment: segment[:1] * 10, (0, 1, 3))
        tensor([10,  1, 20,  2,  3])
    """
    segments = [x] if bounds is None else x.split([b - a for a, b in pairwise(bounds)], axis)
    laid = torch.cat([part for segment in segments for part in (front(segment), segment)], axis)
    if pads is None:
        return laid
    tokens, first = laid.shape[axis] - x.shape[axis], pads[:, None]
    at = torch.arange(laid.shape[axis], device=x.device)
    order = torch.where(at < first, at + tokens, torch.where(at < first + tokens, at - first, at))
    return _gathered(laid, order, axis)


def take_out(
    states: Tensor, tokens: int, bounds: Bounds = None, pads: Tensor | None = None, *, first: bool = False
) -> Tensor:
    """Take the prompt's places out of hidden states.

    Args:
        states: (B, T + S P, D) as the model gives them, S segments.
        tokens: Length P of the prompt.
        bounds: Where segments end without the prompt, (0, ..., T); None for one.
        pads: As in `lay`.
        first: The state of the prompt's first place takes that of the segment's first token.

    Returns:
        (B, T, D).
    """
    if pads is not None:
        at = torch.arange(states.shape[1] - tokens, device=states.device)
        begin = pads[:, None]
        return _gathered(states, at + tokens * ((at > begin) | (at == begin) & (not first)), 1)
    if bounds is None:
        segments: Sequence[Tensor] = [states]
    else:
        segments = states.split([b - a + tokens for a, b in pairwise(bounds)], 1)
    if first:
        return torch.cat([part for s in segments for part in (s[:, :1], s[:, tokens + 1 :])], 1)
    return segments[0][:, tokens:] if len(segments) == 1 else torch.cat([s[:, tokens:] for s in segments], 1)


def _gathered(x: Tensor, order: Tensor, axis: int) -> Tensor:
    """Each row of ``x`` in its own order (B, N)."""
    if axis == 1:
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    return x.expand(*x.shape[:-2], len(order), -1).gather(-1, order.expand(*x.shape[:-2], -1, -1))


__all__ = ["Bounds", "lay", "take_out"]
