"""A head that was learned for some number of classes, cut to fewer: with what is injected around it, and its learned rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers, innermost


@torch.no_grad()
def cut_classes_(module: nn.Module, layer: nn.Linear, count: int, rates: Any) -> None:
    """Leaves the first outputs of a layer.

    Args:
        module: that the layer is in.
        layer: whose outputs are the logits.
        count: how many stay.
        rates: name of a parameter, with / for each dot -> rates of as many numbers in one dimension; they are cut with it.

    Raises:
        Refusal: something is injected around the layer of which nobody has said how it is cut.
    """
    owners = {layer: tuple(layer._parameters), **_wrappers_of(module, layer)}
    cut = {
        id(p): (owner, name)
        for owner, names in owners.items()
        for name in names
        if (p := getattr(owner, name)) is not None
    }
    for name, parameter in list(module.named_parameters()):
        key = name.replace(".", "/")
        if id(parameter) in cut and key in rates:
            rates[key] = nn.Parameter(rates[key].view(parameter.shape)[:count].reshape(-1).clone())
    for owner, name in cut.values():
        parameter = getattr(owner, name)
        setattr(owner, name, nn.Parameter(parameter[:count].clone(), requires_grad=parameter.requires_grad))
    layer.out_features = count


def _wrappers_of(module: nn.Module, layer: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """What is injected around a layer -> its parameters of a number, or a row of numbers, for each output."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for path, wrapper in injected_layers(module).items():
        if innermost(wrapper) is layer:
            names = wrapper.of_outputs()
            if names is None:
                raise Refusal(
                    f"{type(wrapper).__name__} around {path} cannot be cut to fewer classes than the episodes had; give as many, "
                    "or train without an adapter on the classifier."
                )
            found[wrapper] = names
    return found


__all__ = ["cut_classes_"]
