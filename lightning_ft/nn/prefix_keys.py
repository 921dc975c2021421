"""What a learned prefix hands to the attention function, and how keys, values and masks are extended by it.

The layer around an attention module gives one of these objects along as the keyword ``learned_prefix``; transformers'
attention modules hand keywords they do not know through to the attention function, under gradient checkpointing too.

Axes: B rows, H query heads, K key heads, P tokens of the prefix, T tokens, L keys (those of a cache included), d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class LearnedPrefix:
    """Keys and values that every token of one attention layer sees before its own.

    Attributes:
        keys: (K, P, d), as they are after rotation: no position is applied to them.
        values: (K, P, d), of another width where the layer's values are.
        bias: (1, H, T, P): what the layer's relative position bias adds to their scores; None where it has none.
        used: whether the attention function has seen them; a model that swallows the keyword would lose them in silence.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    used: bool = False

    @property
    def length(self) -> int:
        """P."""
        return self.keys.shape[1]

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix and then ``key`` (B, K, L, d) and ``value``, in their dtype."""
        self.used = True
        return (
            torch.cat([self.keys.to(key.dtype).expand(key.shape[0], -1, -1, -1), key], 2),
            torch.cat([self.values.to(value.dtype).expand(value.shape[0], -1, -1, -1), value], 2),
        )

    def extend(self, mask: Tensor | None, keys: int) -> Tensor | None:
        """A mask over L ``keys``, boolean (True: may look) or added to the scores, with P visible columns before it."""
        if mask is None:
            return None
        if mask.ndim == 2:
            mask = mask[None, None]  # what is two-dimensional here is (T, L)
        mask = mask[..., :keys]
        return torch.cat(
            [torch.full_like(mask[..., :1], mask.dtype == torch.bool).expand(*mask.shape[:-1], self.length), mask], -1
        )

    def extend_bias(self, others: dict[str, Any]) -> dict[str, Any]:
        """The model's further arguments, with the prefix's columns before those of its position bias (1, H, T, L)."""
        bias = others.get("position_bias")
        if bias is None:
            return others
        columns = bias.new_zeros(*bias.shape[:-1], self.length) if self.bias is None else self.bias.to(bias.dtype)
        return {**others, "position_bias": torch.cat([columns.expand(*bias.shape[:-1], self.length), bias], -1)}


@dataclass
class Recorder:
    """Takes the place of a prefix to learn what a layer's keys and values look like; changes nothing.

    Attributes:
        keys: (B, K, L, d) of the first call, rotated where the model rotates.
        values: likewise.
        window: how many tokens back the layer sees; None for all.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    window: int | None = None

    def see(self, key: Tensor, value: Tensor, window: int | None) -> None:
        """Keeps what the first call brings; blocks that share a layer call it again."""
        if self.keys is None:
            self.keys, self.values, self.window = key.detach(), value.detach(), window
