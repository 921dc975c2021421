"""Several adapters on one base: which of them the model computes with, and how much of each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import InjectedLayer, injected_layers


def set_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Let a model compute with these adapters alone, the update of each multiplied by its weight.

    Nothing is trained, frozen or copied. An adapter that is not named is off, so that one name switches to it. Where two
    adapters change the same layer, their weighted updates add up, as in `lightning_ft.formats.peft_combined`, which writes
    them as one.

    Args:
        model: Any module that carries adapters.
        weights: Name of an adapter -> what multiplies its update: 0 is off, 1 as it was trained; others, negative ones
            too, for LoRA (all kinds) and (IA)^3.

    Raises:
        Refusal: For a name that the model does not carry, a weight that is not finite, one other than 0 and 1 for a kind
            that has none, and anything but 1 for an adapter that trained parts of the model itself. Nothing is changed then.

    Example:
        >>> from lightning_ft.nn.lora import LoRAConfig, inject_lora
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> for name in "ab":
        ...     _ = inject_lora(net, LoRAConfig(2, target=("0",), adapter_name=name))
        >>> set_adapters(net, {"a": 0.7, "b": 0.3})
        >>> active_adapters(net)
        {'a': 0.7, 'b': 0.3}
    """
    layers = injected_layers(model).values()
    there = sorted({layer.adapter_name for layer in layers})
    for name, weight in weights.items():
        if name not in there:
            raise Refusal(
                f"The model carries no adapter called {name!r}; it carries: {', '.join(map(repr, there)) or 'none'}."
            )
        if not math.isfinite(weight):
            raise Refusal(f"The weight of the adapter {name!r} must be a finite number, got {weight!r}.")
    for layer in layers:
        _check(layer, weights.get(layer.adapter_name, 0.0))
    for layer in layers:
        weight = float(weights.get(layer.adapter_name, 0.0))
        layer.enabled = weight != 0
        layer.strength = weight if weight != 0 else 1.0


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Return the weight of each adapter that a model carries, by name; 0 is off."""
    layers = injected_layers(model).values()
    return {x.adapter_name: x.strength if x.enabled else 0.0 for x in sorted(layers, key=lambda x: x.adapter_name)}


def _check(layer: InjectedLayer, weight: float) -> None:
    name = layer.adapter_name
    if weight not in (0, 1) and not layer.takes_strength:
        raise Refusal(
            f"The adapter {name!r} cannot have the weight {weight:g}: a layer of kind {layer.kind!r} is on (1) or off (0)."
        )
    config = vars(layer).get("config")  # its own attribute: a wrapped block of transformers has a `config` too
    whole = getattr(config, "modules_to_save", ()) or (() if getattr(config, "bias", "none") == "none" else ("biases",))
    if weight != 1 and whole:
        raise Refusal(
            f"The adapter {name!r} cannot have the weight {weight:g}: it trained {', '.join(whole)} in full, which are the model's "
            "own now and cannot be switched; load that adapter on a base of its own."
        )


__all__ = ["active_adapters", "set_adapters"]
