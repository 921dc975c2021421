"""(IA)^3 adapters in the format of Hugging Face PEFT.

A vector is stored as PEFT shapes it: (out, 1) for a scaled output, (1, in) for a scaled input, (1, C, 1, 1) for the
channels of a convolution. Writing goes through `lightning_ft.formats.peft.export_peft`, which finds out the kind.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from lightning_ft.formats.peft_folder import (
    common_config,
    copy_,
    end_of,
    names_of,
    stored_names,
    stored_state,
    target_modules,
    useful,
    whole,
    whole_or_not_at_all,
    whole_places,
)
from lightning_ft.formats.peft_reading import CONFIG_FILE, HARMLESS, PREFIX, patterns, read_json, read_tensors, several
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.ia3 import IA3Config, IA3Layer, ia3_names, inject_ia3, is_scalable
from lightning_ft.nn.registry import base_name, injected_layers, innermost
from lightning_ft.nn.select import is_conv1d

_READ = {"target_modules", "feedforward_modules", "exclude_modules", "modules_to_save", "init_ia3_weights"}
_SUFFIX = ".ia3_l"


def is_ia3(model: nn.Module, adapter_name: str) -> bool:
    """Say whether an adapter of a model is (IA)^3's."""
    return any(isinstance(layer, IA3Layer) for layer in injected_layers(model, adapter_name).values())


def ia3_adapter(model: nn.Module, adapter_name: str) -> tuple[IA3Config, dict[str, IA3Layer]]:
    """Return the configuration of an adapter that is there, and its layers by pristine name."""
    layers = {
        base_name(path, model): layer
        for path, layer in injected_layers(model, adapter_name).items()
        if isinstance(layer, IA3Layer)
    }
    return next(iter(layers.values())).config, layers


def ia3_config(model: nn.Module, *, adapter_name: str = "ia3", base_model_name: str | None = None) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for an (IA)^3 adapter that a model carries.

    Raises:
        Refusal: If PEFT would read its modules to save otherwise.
    """
    config, layers = ia3_adapter(model, adapter_name)
    saved = stored_names(model, config.modules_to_save)
    inner = [name for name, layer in layers.items() if layer.feedforward]
    targets = target_modules(list(layers), names_of(model), saved)
    return {
        **common_config(model, "IA3", base_model_name),
        "target_modules": targets,
        "feedforward_modules": _feedforward_modules(inner, list(layers), targets),
        "exclude_modules": None,
        "fan_in_fan_out": any(is_conv1d(innermost(layer)) for layer in layers.values()),
        "modules_to_save": saved or None,
        "init_ia3_weights": True,
    }


def ia3_state(model: nn.Module, adapter_name: str = "ia3") -> dict[str, Tensor]:
    """Return the vectors under PEFT's names; under FSDP2 they are gathered, so every rank calls this."""
    config, layers = ia3_adapter(model, adapter_name)
    tensors = {}
    for name, layer in layers.items():
        vector = whole(layer.ia3_scale)
        if isinstance(innermost(layer), nn.Conv2d):
            vector = vector.view(1, -1, 1, 1)
        else:
            vector = vector.view(1, -1) if layer.feedforward else vector.view(-1, 1)
        tensors[f"{PREFIX}{name}{_SUFFIX}"] = vector
    return tensors | stored_state(model, config.modules_to_save)


def read_ia3(folder: str | Path, *, adapter_name: str = "ia3") -> tuple[IA3Config, dict[str, Tensor]]:
    """Read an adapter's folder: its configuration, and its tensors under our names (``<module>.ia3_scale``).

    Raises:
        Refusal: If the folder holds no (IA)^3 adapter, or a damaged one.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "IA3":
        raise Refusal(
            f"{folder} holds an adapter of type {raw.get('peft_type')}, not IA3; load it with that technique."
        )
    for key, value in raw.items():
        if key not in _READ and key not in HARMLESS and value not in (None, False, {}, [], "none"):
            raise Refusal(
                f"{folder / CONFIG_FILE} sets {key}={value!r}, which IA3 here does not have; retrain without it."
            )
    try:
        config = IA3Config(
            target=patterns(raw["target_modules"]),
            feedforward=several(raw["feedforward_modules"]),
            exclude=several(raw.get("exclude_modules")),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            adapter_name=adapter_name,
        )
    except (KeyError, TypeError) as error:
        raise Refusal(f"{folder / CONFIG_FILE} is damaged or incomplete: {type(error).__name__} {error}.") from error
    tensors: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        name = key.removeprefix(PREFIX)
        if name.endswith(_SUFFIX):
            tensors[f"{name.removesuffix(_SUFFIX)}.ia3_scale"] = tensor.reshape(-1)
        else:
            tensors[name] = tensor
    return config, tensors


def load_ia3_(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "ia3", freeze_base: bool = True
) -> dict[str, IA3Layer]:
    """Inject the (IA)^3 adapter of a folder into a model, in place, with its stored values.

    Args:
        model: The model that the adapter was trained on, without it.
        folder: A folder as PEFT or `lightning_ft.formats.peft.export_peft` writes it.
        adapter_name: Name to give the adapter.
        freeze_base: As in `lightning_ft.nn.ia3.inject_ia3`.

    Returns:
        The injected layers by pristine name.

    Raises:
        Refusal: As in `read_ia3`; if a tensor is missing, left over or of another shape. The model is unchanged then.
    """
    config, tensors = read_ia3(folder, adapter_name=adapter_name)
    config = _resolved(config, model)
    with whole_or_not_at_all(model):
        layers = inject_ia3(model, config, freeze_base=freeze_base)
        places: dict[str, Tensor] = {f"{name}.ia3_scale": layer.ia3_scale for name, layer in layers.items()}
        copy_(places | whole_places(model, config.modules_to_save), tensors, folder)
    for layer in layers.values():
        layer.starts_as_identity = False
    return layers


def _feedforward_modules(inner: list[str], chosen: list[str], targets: list[str] | str) -> list[str] | str:
    """Return PEFT's ``feedforward_modules``: some of its targets, or a regex.

    PEFT compares the ends of names here, without regard to dots, and wants a subset of a list of targets.
    """
    if isinstance(targets, str):
        return "|".join(re.escape(name) for name in inner) or "(?!)"
    for parts in (1, 2, len(max(chosen, key=lambda name: name.count(".")).split("."))):
        ends = {end_of(name, parts) for name in inner}
        if ends <= set(targets) and [n for n in chosen if n.endswith(tuple(ends))] == inner:
            return sorted(ends)
    return "|".join(re.escape(name) for name in inner)


def _resolved(config: IA3Config, model: nn.Module) -> IA3Config:
    """Drop patterns that mean nothing in this model, which PEFT allows, and name the feed-forward's layers one by one."""
    places = names_of(model)
    wrappable = [name for name, module in places.items() if is_scalable(module)]
    saved = tuple(name for name in places if any(name.endswith(end) for end in config.modules_to_save))
    target = (config.target,) if isinstance(config.target, str) else config.target
    if config.target != "all-linear":
        config = replace(config, target=useful(target, wrappable) or config.target)
    config = replace(config, exclude=useful(config.exclude, wrappable), modules_to_save=saved)
    names = list(ia3_names(model, replace(config, feedforward=())))
    return replace(
        config, feedforward=tuple(n for n in names if _is_inner(n, cast("tuple[str, ...]", config.feedforward)))
    )


def _is_inner(name: str, ends: tuple[str, ...]) -> bool:
    return any(re.fullmatch(end[3:], name) if end.startswith("re:") else name.endswith(end) for end in ends)


__all__ = ["ia3_adapter", "ia3_config", "ia3_state", "is_ia3", "load_ia3_", "read_ia3"]
