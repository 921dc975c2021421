"""Rewards that are shifted and scaled, written into the head that transformers computes them with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers

MEAN = "reward_mean"
"""Key of a model's configuration: what its scores exceed the normalised rewards by, where its head has no bias to hold it."""


@contextmanager
def folded(model: Any, head: nn.Linear, mean: float, std: float) -> Iterator[str]:
    """Inside, the model itself gives (r - mean) / std, by its head's weight and bias; afterwards it is bit for bit as before.

    Heads of transformers' decoders have no bias, nor do they load one: there the model gives r / std, which differs by one
    constant for all rows, and ``reward_mean`` of its configuration is that constant.

    Args:
        model: a transformers model with a head of one output.
        head: the layer of the model that gives the reward; may be sharded.
        mean: of the rewards over reference rows.
        std: their standard deviation.

    Yields:
        What to say of it; nothing where nothing is left over.

    Raises:
        Refusal: the head carries an adapter, which would be scaled apart from it.
    """
    if (mean, std) == (0.0, 1.0):
        yield ""
        return
    if any(head in layer.modules() for layer in injected_layers(model).values()):
        raise Refusal(
            "Normalised rewards are scaled in the head, which carries an adapter of its own here; train the head whole (leave it "
            "out of the adapter's targets), as is the default."
        )
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    offset = 0.0 if head.bias is not None else mean / std
    with torch.no_grad():
        if head.bias is not None:
            head.bias.sub_(mean).div_(std)
        head.weight.div_(std)
    if offset:
        setattr(model.config, MEAN, offset)
    try:
        yield (
            f"The head of {type(model).__name__} has no bias, so its scores are the rewards plus {offset:.6g}, the same "
            "for all rows."
            if offset
            else ""
        )
    finally:
        if offset:
            delattr(model.config, MEAN)
        with torch.no_grad():
            for name, p in head.named_parameters():
                p.copy_(before[name])
