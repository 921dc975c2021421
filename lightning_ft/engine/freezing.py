"""Freezing as plain functions: which parameters a pattern means, and letting only some of them train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_ft.nn.registry import InjectedLayer, pristine_modules
from lightning_ft.nn.select import LayerSpec, select


def parameters_named(
    model: nn.Module, patterns: Sequence[str] | str, *, layers: LayerSpec | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the pristine model that patterns mean, by pristine name.

    A pattern may name a parameter (``lm_head.weight``, ``*.bias``) or a module, which means all parameters below it.

    Args:
        model: any module; parts of injected layers are never meant.
        patterns: see `lightning_ft.nn.select`.
        layers: only those inside these repeated blocks.

    Raises:
        Refusal: for a pattern without a match, with the nearest names.
    """
    below: dict[str, dict[str, nn.Parameter]] = {}
    for name, (_, module) in pristine_modules(model).items():
        while isinstance(module, InjectedLayer):
            module = module.base
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{name}.{key}" if name else key
            parts = full.split(".")
            for end in range(1, len(parts) + 1):
                below.setdefault(".".join(parts[:end]), {})[full] = parameter
    chosen: dict[str, nn.Parameter] = {}
    for name in select(below, patterns, layers=layers):
        chosen.update(below[name])
    return chosen


def freeze_base(model: nn.Module) -> None:
    """Lets nothing of the model train but what was injected."""
    injected = {
        id(p)
        for layer in model.modules()
        if isinstance(layer, InjectedLayer)
        for p in layer.injected_parameters().values()
    }
    for parameter in model.parameters():
        if id(parameter) not in injected:
            parameter.requires_grad_(False)
