"""An exponential moving average of named tensors, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def decay_at(update: int, decay: float, *, warmup: bool) -> float:
    """Share of the old average that update number ``update`` keeps; the first (0) keeps nothing, since there is none.

    Args:
        update: how many updates were made before.
        decay: the share in the long run.
        warmup: keep at most ``(1 + n) / (10 + n)`` at update n, so that a young average forgets its first weights: it then
            reaches back over about a ninth of the updates so far.
    """
    if update == 0:
        return 0.0
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


@torch.no_grad()
def move_(average: dict[str, Tensor], values: Mapping[str, Tensor], decay: float) -> None:
    """``m <- decay m + (1 - decay) x`` for each name, in place and in float32; names without an average get ``x``."""
    for name, value in values.items():
        if name in average and decay > 0:
            average[name].lerp_(value.detach().to(average[name].dtype), 1 - decay)
        elif name in average:
            average[name].copy_(value)
        else:
            average[name] = value.detach().to(torch.float32, copy=True)  # sharded where the value is
