"""A head for one task on hidden states that several tasks share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ft.nn.seeding import seeded_generator

Pool = Literal["first", "last", "mean"]


class TaskHead(nn.Module):
    """Dropout and a linear layer, in float32 whatever the trunk computes in.

    Args:
        width: D of the hidden states.
        outputs: C, classes, or 1 for a number.
        dropout: share of the inputs that are dropped while training.
        name: with the seed it decides the first values: normal with deviation .02, biases 0, the same on every rank.
        seed: of the run.
    """

    def __init__(self, width: int, outputs: int, *, dropout: float, name: str, seed: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, outputs, dtype=torch.float32)
        with torch.no_grad():
            drawn = torch.randn(outputs, width, generator=seeded_generator(seed, name), device="cpu")
            self.out.weight.copy_(drawn * 0.02)
            self.out.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, C)."""
        out: Tensor = self.out(self.dropout(hidden.float()))
        return out


def pool_rows(hidden: Tensor, *, bounds: tuple[int, ...] | None, mask: Tensor | None, how: Pool) -> Tensor:
    """One vector for each row.

    Args:
        hidden: (1, T, D) packed, or (B, T, D) padded on the right.
        bounds: packed: cumulative segment bounds.
        mask: padded: (B, T), True on real tokens.
        how: the first token's, the last real one's, or the mean of all real ones.

    Returns:
        (S, D).
    """
    if bounds is not None:
        edges = torch.tensor(bounds, device=hidden.device)
        if how == "mean":
            lengths = edges[1:] - edges[:-1]
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
            sums = hidden.new_zeros(len(lengths), hidden.shape[-1], dtype=torch.float32)
            return sums.index_add(0, owner, hidden[0].float()) / lengths[:, None]
        return hidden[0].index_select(0, edges[:-1] if how == "first" else edges[1:] - 1)
    assert mask is not None, "padded rows come with a mask"
    if how == "mean":
        real = mask[..., None].to(torch.float32)
        return (hidden.float() * real).sum(1) / real.sum(1)
    if how == "first":
        return hidden[:, 0]
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(-1) - 1]


__all__ = ["Pool", "TaskHead", "pool_rows"]
