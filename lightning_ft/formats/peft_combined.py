"""A weighted combination of LoRA adapters as one adapter in PEFT's format.

The factors stand side by side: ranks add up, and the product of the concatenation is the sum of the products, exactly
(PEFT's combination type "cat"). Averaging the factors instead would not be the average of the updates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lightning_ft.formats.peft import export_factors, lora_layers, peft_config
from lightning_ft.formats.peft_folder import (
    names_of,
    refuse_others,
    stored_names,
    stored_state,
    target_modules,
    write_peft,
)
from lightning_ft.formats.peft_reading import PREFIX
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora_layers import LoRAConv1D, LoRAConv2d, LoRALayer


def export_combined(
    model: nn.Module, folder: str | Path, weights: Mapping[str, float], *, base_model_name: str | None = None
) -> Path:
    """Write adapters that a model carries as one: what `lightning_ft.nn.adapters.set_adapters` with these weights computes.

    Args:
        model: The model that carries the adapters.
        folder: Where to write; an earlier adapter there is replaced, anything else is refused.
        weights: Name of an adapter -> what multiplies its update; adapters that are not named, or have weight 0, are left out.
        base_model_name: Recorded so that PEFT's ``Auto`` classes find the base; None reads it from the model.

    Returns:
        The folder.

    Raises:
        Refusal: For adapters that are not there or not plain LoRA (DoRA's change is no product of factors; modules trained
            in full exist once), and for grouped convolutions.
    """
    refuse_others(model, instead="write the whole model with merge")
    return write_peft(folder, combined_config(model, weights, base_model_name), combined_state(model, weights))


def combined_config(
    model: nn.Module, weights: Mapping[str, float], base_model_name: str | None = None
) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for the combination."""
    stacks = _stacks(model, weights)
    ranks = {name: sum(rank for _, _, rank in stack) for name, stack in stacks.items()}
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    saved = stored_names(model, ())
    first = next(name for name, weight in weights.items() if weight)
    layers = [layer for stack in stacks.values() for layer, _, _ in stack]
    return {
        **peft_config(model, adapter_name=first, base_model_name=base_model_name),
        "r": usual,
        "lora_alpha": usual,  # the scale of each is in its factors
        "lora_dropout": max(layer.dropout for layer in layers),
        "target_modules": target_modules(list(stacks), names_of(model), saved),
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers),
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": saved or None,
    }


def combined_state(model: nn.Module, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the concatenated factors under PEFT's names; under FSDP2 they are gathered, so every rank calls this."""
    tensors: dict[str, Tensor] = {}
    for name, stack in _stacks(model, weights).items():
        down, up = [], []
        for layer, weight, _ in stack:
            factors = export_factors(layer)
            keys = list(factors)
            down.append(factors[keys[0]])
            up.append(factors[keys[1]] * (weight * layer.scale))
        tensors[f"{PREFIX}{name}.{keys[0]}"] = torch.cat(down, 0)
        tensors[f"{PREFIX}{name}.{keys[1]}"] = torch.cat(up, 1)
    return tensors | stored_state(model, ())


def _stacks(model: nn.Module, weights: Mapping[str, float]) -> dict[str, list[tuple[LoRALayer, float, int]]]:
    """Return (layer, weight, stored rank) of each adapter by pristine name, in the model's order."""
    found: dict[str, list[tuple[LoRALayer, float, int]]] = {}
    for adapter, weight in weights.items():
        layers = lora_layers(model, adapter)
        config = next(iter(layers.values())).config
        beside = [*config.modules_to_save, *(["biases"] if config.bias != "none" else ())]
        beside += ["rows of an embedding"] if config.trainable_tokens else []
        if config.dora or beside:
            reason = "DoRA's change is no product of factors" if config.dora else f"it also trained {', '.join(beside)}"
            raise Refusal(f"The adapter {adapter!r} cannot be combined with others: {reason}; export it alone.")
        for name, layer in layers.items():
            if isinstance(layer, LoRAConv2d) and cast(int, layer.groups) > 1:
                raise Refusal(
                    f"The adapter {adapter!r} cannot be combined with others: {name!r} is a convolution with groups, whose "
                    "factors cannot stand side by side; export it alone."
                )
            if weight:
                found.setdefault(name, []).append((layer, float(weight), layer.r * (1 if layer.lora_A0 is None else 2)))
    if not found:
        raise Refusal("Nothing to combine: every adapter has the weight 0; give at least one another.")
    return {name: found[name] for name in names_of(model) if name in found}


__all__ = ["combined_config", "combined_state", "export_combined"]
