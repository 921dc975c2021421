"""A key-value cache with room for what is to come.

Transformers' own joins the old keys and the new one in each step, so that writing T tokens copies the cache T times. Here
space is taken once, for as many tokens as may be written, and a step writes only its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, (B, K, L, d), as views of larger tensors."""

    def __init__(self, room: int = 0, **kwargs: Any) -> None:
        """Args: room: tokens beyond the first call's for which space is taken at once."""
        super().__init__(**kwargs)
        self.room = room
        self._stores: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, d) and returns all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._stores is None or self._stores[0].shape[-2] < after:
            self._stores = (
                self._larger(self.keys, key_states, before),
                self._larger(self.values, value_states, before),
            )
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, before:after] = new
        self.keys, self.values = (store[:, :, :after] for store in self._stores)
        return self.keys, self.values

    def _larger(self, old: Tensor | None, new: Tensor, before: int) -> Tensor:
        rows, heads, tokens, width = new.shape
        store = new.new_empty(rows, heads, before + tokens + max(self.room, 0), width)
        if before and old is not None:
            store[:, :, :before] = old
        return store

    def reset(self) -> None:
        """Forgets everything."""
        self._stores = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens off; ``tokens_to_remove`` is negative, as in transformers."""
        self._stores = None
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Puts the rows in another order."""
        self._stores = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes so many, one after the other."""
        self._stores = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows only."""
        self._stores = None
        super().batch_select_indices(indices)


def growing_cache(config: Any, room: int) -> DynamicCache:
    """A cache for a model whose layers see everything before them in one tensor; layers with a window keep their own kind.

    Args:
        config: of the model.
        room: tokens that will be written after the first call.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps these rows (N,) of a cache."""
    with torch.no_grad():
        cache.batch_select_indices(rows)
