"""Which modules an adapter wraps, which it trains whole, and what stays trainable when the base is frozen.

Shared by the techniques that choose modules by name (LoRA, (IA)^3). A target that cannot be wrapped is refused, never
passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import has_packed_weights, is_packed
from lightning_ft.nn.registry import (
    InjectedLayer,
    injected_layers,
    innermost,
    pristine_modules,
    shared_parameters,
)
from lightning_ft.nn.select import ALL_LINEAR, LayerSpec, is_broad, linear_names, matches, select


class Targets(Protocol):
    """What the configuration of an adapter says of the modules that it wraps."""

    @property
    def target(self) -> tuple[str, ...] | str: ...  # noqa: D102
    @property
    def exclude(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def layers(self) -> LayerSpec | None: ...  # noqa: D102
    @property
    def modules_to_save(self) -> tuple[str, ...]: ...  # noqa: D102


def wrapped_names(
    model: nn.Module, config: Targets, wraps: Callable[[nn.Module], bool], *, technique: str, kinds: str
) -> list[str]:
    """Return the pristine names of the modules that a configuration wraps, in model order.

    Args:
        model: The model, with the adapter or before it gets it.
        config: Patterns of names, ``all-linear`` among them.
        wraps: Whether a module of the pristine model can be wrapped.
        technique: Name of the technique, for messages.
        kinds: What it wraps, for messages.

    Raises:
        Refusal: If a pattern matches nothing, or what cannot be wrapped; if nothing is left.
    """
    places = {name: innermost(module) for name, (_, module) in pristine_modules(model).items() if name}
    if config.target == ALL_LINEAR:
        linear = set(linear_names(model))
        if not linear:
            raise Refusal("'all-linear' found no linear layer in this model; name the modules to wrap.")
        chosen = select([n for n in places if n in linear], "*", layers=config.layers)
    else:
        patterns = (config.target,) if isinstance(config.target, str) else config.target
        wrappable = {name: module for name, module in places.items() if wraps(module)}
        for pattern in patterns:
            _refuse_unwrappable(model, places, pattern, wraps, technique, kinds)
        chosen = select(wrappable, patterns, layers=config.layers)
    left_out = set(select(places, config.exclude)) if config.exclude else set()
    left_out |= set(select(places, config.modules_to_save)) if config.modules_to_save else set()
    chosen = [name for name in chosen if not is_inside(name, left_out)]
    if not chosen:
        raise Refusal("Every module that target selects is excluded or among modules_to_save; nothing is left to wrap.")
    return chosen


def whole_modules(model: nn.Module, patterns: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that are trained in full beside an adapter (its ``modules_to_save``), by pristine name.

    Raises:
        Refusal: If a pattern matches nothing, or if another module holds the same parameter.
    """
    places = {name: innermost(module) for name, (_, module) in pristine_modules(model).items() if name}
    names = select(places, patterns) if patterns else []
    tied = shared_parameters(model)
    for name in names:
        for parameter in places[name].parameters():
            if parameter in tied:
                raise Refusal(
                    f"modules_to_save cannot hold {name!r}: its weight is tied ({' = '.join(tied[parameter])}), and "
                    "a stored adapter would untie it; give the head a weight of its own (tie_word_embeddings=False), "
                    "or adapt it like the other layers."
                )
            if is_packed(parameter):
                raise Refusal(
                    f"modules_to_save cannot hold {name!r}: its weight is packed ({parameter.dtype}) and cannot be trained in "
                    "place; give it factors like the other layers, or leave quantize out."
                )
    return {name: places[name] for name in names}


def freeze_around(model: nn.Module, more: Iterable[nn.Parameter] = ()) -> None:
    """Let nothing of a model train but injected layers and the modules that their adapters train whole.

    Args:
        model: The model, adapters in place.
        more: Further parameters that keep their state.
    """
    keep = {*more}
    for layer in injected_layers(model).values():
        keep |= set(layer.injected_parameters().values())
        for module in whole_modules(model, _modules_to_save(layer)).values():
            keep |= set(module.parameters())
    for parameter in model.parameters():
        if parameter not in keep:
            parameter.requires_grad_(False)


def leave_fused_path(model: nn.Module) -> None:
    """Keep PyTorch's own transformer blocks from computing with the stored base weights only.

    In evaluation ``nn.TransformerEncoderLayer`` hands the weights of its linear layers to one fused kernel without
    calling them; a block that carries an injected or packed layer gives up that kernel, which changes no result otherwise.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if injected_layers(module) or has_packed_weights(module):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False


def is_inside(name: str, containers: set[str]) -> bool:
    """Say whether a name is one of the containers or lies inside one."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in containers for i in range(len(parts)))


def _modules_to_save(layer: InjectedLayer) -> tuple[str, ...]:
    # Its own attribute: a wrapped block of transformers has a `config` too.
    return getattr(vars(layer).get("config"), "modules_to_save", ())


def _refuse_unwrappable(
    model: nn.Module,
    places: dict[str, nn.Module],
    pattern: str,
    wraps: Callable[[nn.Module], bool],
    technique: str,
    kinds: str,
) -> None:
    """Refuse a pattern that means parameters, or modules that cannot be wrapped."""
    found = {name: module for name, module in places.items() if matches(name, pattern)}
    others = {name: module for name, module in found.items() if not wraps(module)}
    if not others and found:
        return
    # Before transformers 5 each expert was a layer: w1 to w3 inside experts.0 and so on.
    of_old = not found and ("experts" in pattern or pattern in ("w1", "w2", "w3"))
    for name, shape in expert_tensors(model).items():
        means = of_old or matches(name, pattern) or name.rpartition(".")[0] in others
        if means and len(others) == len(found):
            raise Refusal(
                f"{technique} cannot wrap {name!r}: it is one tensor of shape {shape} that holds all experts of a mixture, "
                "not a linear layer that is called; choose linear layers such as the attention's 'q_proj'."
            )
    if others and (not is_broad(pattern) or len(others) == len(found)):
        name, module = next(iter(others.items()))
        raise Refusal(
            f"{technique} cannot wrap {name!r}, a {type(module).__name__}: it wraps {kinds}; "
            f"to take the layers inside it, write '*{name.split('.')[-1]}.*'."
        )


def expert_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that holds a matrix for every expert of a mixture (E, ., .), by pristine name."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (_, module) in pristine_modules(model).items():
        if isinstance(innermost(module), nn.modules.conv._ConvNd):
            continue
        for key, parameter in innermost(module)._parameters.items():
            if parameter is not None and parameter.dim() == 3:
                found[f"{name}.{key}" if name else key] = tuple(parameter.shape)
    return found


__all__ = [
    "Targets",
    "expert_tensors",
    "freeze_around",
    "is_inside",
    "leave_fused_path",
    "whole_modules",
    "wrapped_names",
]
