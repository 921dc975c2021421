"""Merging: the plain model whose weights do alone what base weights and injected layers do together."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import is_packed
from lightning_ft.nn.registry import (
    base_name,
    injected_layers,
    innermost,
    replace_module,
    shared_parameters,
)
from lightning_ft.nn.trainable_tokens import TokenRows


@torch.no_grad()
def merge_injected_(model: nn.Module) -> nn.Module:
    """Merge every layer that changes a weight into the weight that it wraps and take the wrapper off, in place.

    Weights are computed in fp32 (float64 for a float64 base) and rounded once to the base's dtype. A layer that is
    switched off is taken off without merging. Never do this to a model that trains on: use `merged_copy`.

    Args:
        model: A copy that the caller made.

    Returns:
        The same model.

    Raises:
        Refusal: If a base weight is packed, or tied to another module's. The model is unchanged then.
    """
    layers = {path: x for path, x in injected_layers(model).items() if x.changes_weight}
    tied = shared_parameters(model)
    for path, layer in layers.items():
        weight = innermost(layer).weight
        assert isinstance(weight, nn.Parameter)
        if is_packed(weight):
            raise Refusal(
                f"The adapter on {base_name(path, model)!r} cannot be merged: its base weight is packed ({weight.dtype}); "
                "load the base unquantised, load the adapter there and merge."
            )
        # Rows of a table are trained in all modules that share it, so they are merged into all as well.
        if weight in tied and layer.enabled and not isinstance(layer, TokenRows):
            raise Refusal(
                f"The adapter on {base_name(path, model)!r} cannot be merged: its weight is tied "
                f"({' = '.join(tied[weight])}), so the merge would change the other one as well; export the adapter "
                "instead, or untie the weights before training."
            )
    merged: dict[nn.Parameter, torch.Tensor] = {}
    for layer in reversed(layers.values()):  # inner wrappers first
        if layer.enabled:
            parts = innermost(layer)._parameters
            for parameter, merge in ((parts["weight"], layer.merge_into), (parts.get("bias"), layer.merge_into_bias)):
                if parameter is not None:
                    merged[parameter] = merge(merged.get(parameter, _wide(parameter)))
    for parameter, value in merged.items():
        parameter.copy_(value)
    for path in reversed(layers):
        replace_module(model, path, layers[path].base)
    return model


def _wide(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy without injected layers whose weights hold what they did; the model itself is not touched.

    Raises:
        Refusal: As for `merge_injected_`, and if the model carries injected layers that are not a change of weight.
    """
    for path, layer in injected_layers(model).items():
        if not layer.changes_weight:
            why = getattr(layer, "unmergeable", "what it does is not a change of one")
            raise Refusal(
                f"{base_name(path, model)!r} carries the {layer.kind} adapter {layer.adapter_name!r}, which cannot be merged "
                f"into a weight, because {why}; export it as an adapter instead."
            )
    return merge_injected_(copy.deepcopy(model))


__all__ = ["merge_injected_", "merged_copy"]
