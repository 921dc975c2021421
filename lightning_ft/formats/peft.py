"""LoRA adapters in the format of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names are those of the Hugging Face model that was adapted, behind ``base_model.model.``. PEFT loads a file with wrong
names without an error, as an untrained adapter; so reading is strict here, both ways, and the tests of writing compare
logits in PEFT itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lightning_ft.formats.peft_folder import (
    common_config,
    copy_,
    meant_adapter,
    names_of,
    refuse_others,
    stored_names,
    stored_state,
    target_modules,
    useful,
    whole,
    whole_or_not_at_all,
    whole_places,
    write_peft,
)
from lightning_ft.formats.peft_ia3 import ia3_adapter, ia3_config, ia3_state, is_ia3
from lightning_ft.formats.peft_prefix import is_prefix, prefix_config, prefix_state
from lightning_ft.formats.peft_prompt import is_prompt, prompt_config, prompt_state
from lightning_ft.formats.peft_reading import (
    EMBEDDING_SUFFIXES,
    PREFIX,
    ROWS_SUFFIXES,
    SUFFIXES,
    WRAPPED_BIAS,
    read_peft,
)
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import (
    LoRAConfig,
    adapter_configs,
    bias_parameters,
    inject_lora,
    target_names,
)
from lightning_ft.nn.lora_init import FROM_WEIGHT, difference
from lightning_ft.nn.lora_layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALayer, layer_class
from lightning_ft.nn.registry import base_name, injected_layers, innermost, pristine_modules
from lightning_ft.nn.select import ALL_LINEAR
from lightning_ft.nn.trainable_tokens import HeadRows, TokenRows, input_embedding

_BASE_SUFFIX = ".base_layer.weight"


def export_peft(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default", base_model_name: str | None = None
) -> Path:
    """Write a LoRA adapter, with its modules to save, as a folder that PEFT loads.

    Args:
        model: The Hugging Face model (or any module) that carries the adapter; names in the file are relative to it.
        folder: Where to write; an earlier adapter there is replaced, anything else is refused.
        adapter_name: Which adapter; ``default`` is also the only one that there is, whatever its name.
        base_model_name: Recorded so that PEFT's ``Auto`` classes find the base; None reads it from the model.

    Returns:
        The folder.

    Raises:
        Refusal: If there is no such adapter, or the format cannot express it.
    """
    adapter_name = meant_adapter(model, adapter_name)
    check_others(model, adapter_name)
    return write_peft(
        folder,
        peft_config(model, adapter_name=adapter_name, base_model_name=base_model_name),
        peft_state(model, adapter_name),
    )


def check_others(model: nn.Module, adapter_name: str, *, late: Collection[str] = ()) -> None:
    """Refuse to leave out what trained beside an adapter, or will (``late``, names of parameters that are frozen now)."""
    advice = "write the whole model with merge, or train whole modules by {}.modules_to_save"
    if is_ia3(model, adapter_name):
        saved = ia3_adapter(model, adapter_name)[0].modules_to_save
        refuse_others(model, saved, late=late, instead=advice.format("ia3"))
    elif is_prompt(model, adapter_name) or is_prefix(model, adapter_name):
        refuse_others(model, late=late)
    else:
        config = next(iter(lora_layers(model, adapter_name).values())).config
        biases = bias_parameters(model, config).values()
        refuse_others(model, config.modules_to_save, biases, late=late, instead=advice.format("lora"))


def peft_config(
    model: nn.Module, *, adapter_name: str = "default", base_model_name: str | None = None
) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for an adapter that a model carries."""
    adapter_name = meant_adapter(model, adapter_name)
    if is_ia3(model, adapter_name):
        return ia3_config(model, adapter_name=adapter_name, base_model_name=base_model_name)
    if is_prompt(model, adapter_name):
        return prompt_config(model, adapter_name=adapter_name, base_model_name=base_model_name)
    if is_prefix(model, adapter_name):
        return prefix_config(model, adapter_name=adapter_name, base_model_name=base_model_name)
    layers = lora_layers(model, adapter_name)
    config = next(iter(layers.values())).config
    places = names_of(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRAConv2d) and set(cast("tuple[int, ...]", layer.dilation)) != {1}:
            raise Refusal(f"The adapter on {name!r} cannot be written: PEFT ignores the dilation of convolutions.")
    saved = stored_names(model, config.modules_to_save)
    # What started at a part of the weight is written as the difference to that start, of twice the rank.
    double = 2 if config.init in FROM_WEIGHT else 1
    wider = math.sqrt(double) if config.rslora else double  # so that the scale stays as it is
    return {
        **common_config(model, "LORA", base_model_name),
        "r": config.r * double,
        "lora_alpha": _plain(config.alpha * wider),
        "lora_dropout": config.dropout,
        "target_modules": target_modules(list(layers), places, saved),
        "exclude_modules": None,
        "bias": config.bias,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        # One entry a module, whole names: a suffix that the user wrote could match more in another tool.
        "rank_pattern": {f"^{re.escape(n)}": x.r * double for n, x in layers.items() if x.r != config.r},
        "alpha_pattern": {
            f"^{re.escape(n)}": _plain(x.alpha * wider) for n, x in layers.items() if x.alpha != config.alpha
        },
        "modules_to_save": saved or None,
        "init_lora_weights": True,  # the name of another method would make a loader change the base weights
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "lora_bias": False,
        "target_parameters": None,
        "trainable_token_indices": _token_indices(model, adapter_name),
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
    }


def peft_state(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's names; under FSDP2 they are gathered, so every rank calls this."""
    adapter_name = meant_adapter(model, adapter_name)
    if is_ia3(model, adapter_name):
        return ia3_state(model, adapter_name)
    if is_prompt(model, adapter_name):
        return prompt_state(model, adapter_name)
    if is_prefix(model, adapter_name):
        return prefix_state(model, adapter_name)
    layers = lora_layers(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for suffix, tensor in export_factors(layer).items():
            tensors[f"{PREFIX}{name}.{suffix}"] = tensor
    config = next(iter(layers.values())).config
    tensors |= stored_state(model, config.modules_to_save)
    for name, rows in _stored_rows(model, adapter_name).items():
        tensors[f"{PREFIX}{name}.{ROWS_SUFFIXES['token_rows']}"] = whole(rows.token_rows)
    for name, bias in bias_parameters(model, config).items():
        owner = name.removesuffix(".bias")
        tensors[f"{PREFIX}{owner}.{WRAPPED_BIAS}" if owner in layers else f"{PREFIX}{name}"] = whole(bias)
    return tensors


def export_factors(layer: LoRALayer) -> dict[str, Tensor]:
    """Return a layer's tensors by the end of PEFT's names, ``A`` first and ``B`` second, gathered."""
    parts = {key: whole(p) for key, p in layer.injected_parameters().items()}
    factors = difference(parts["lora_A"], parts["lora_B"], parts.get("lora_A0"), parts.get("lora_B0"))
    parts["lora_A"], parts["lora_B"] = factors
    if isinstance(layer, LoRAConv2d) and layer.dora:
        parts["lora_magnitude"] = parts["lora_magnitude"].view(1, -1, 1, 1)
    return {suffix: parts[parameter] for parameter, suffix in _suffixes(layer).items() if parameter in parts}


def load_peft_(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    dropout: float | None = None,
    freeze_base: bool = True,
) -> dict[str, LoRALayer]:
    """Inject the adapter of a folder into a model, in place, with its stored values.

    Args:
        model: The model that the adapter was trained on, without it.
        folder: A folder as PEFT or `export_peft` writes it.
        adapter_name: Name to give the adapter.
        dropout: Dropout for training on; None takes the stored one.
        freeze_base: As in `inject_lora`.

    Returns:
        The injected layers by pristine name.

    Raises:
        Refusal: As in `read_peft`; if a tensor is missing, left over or of another shape. The model is unchanged then.
    """
    config, tensors = read_peft(folder, adapter_name=adapter_name)
    config = _resolved(config if dropout is None else replace(config, dropout=dropout), model, tensors)
    with whole_or_not_at_all(model):
        layers = inject_lora(model, config, freeze_base=freeze_base)
        places: dict[str, Tensor] = {
            f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.injected_parameters().items()
        }
        places |= {f"{n}.token_rows": rows.token_rows for n, rows in _stored_rows(model, adapter_name).items()}
        places |= bias_parameters(model, config)
        places |= whole_places(model, config.modules_to_save)
        _check_base(model, tensors, folder)
        copy_(places, {key: t for key, t in tensors.items() if not key.endswith(_BASE_SUFFIX)}, folder)
    for layer in injected_layers(model, adapter_name).values():
        layer.starts_as_identity = False
    return layers


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
    """Return the layers of one adapter by pristine name."""
    found = injected_layers(model, adapter_name)
    if not found:
        names = ", ".join(repr(name) for name in adapter_configs(model)) or "none"
        raise Refusal(f"The model carries no LoRA adapter called {adapter_name!r}; it carries: {names}.")
    layers: dict[str, LoRALayer] = {}
    for path, layer in found.items():
        if isinstance(layer, TokenRows):
            continue
        if not isinstance(layer, LoRALayer):
            raise Refusal(
                f"The adapter {adapter_name!r} is of kind {layer.kind!r}, not LoRA; write it in its own format."
            )
        layers[base_name(path, model)] = layer
    return layers


def _stored_rows(model: nn.Module, adapter_name: str) -> dict[str, TokenRows]:
    """Return one layer of trained rows for each group of tied tables, by the pristine name of the first, an embedding.

    Raises:
        Refusal: Where PEFT would compute something else.
    """
    stored: dict[nn.Parameter, tuple[str, TokenRows]] = {}
    tying = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for path, layer in injected_layers(model, adapter_name).items():
        if not isinstance(layer, TokenRows):
            continue
        name = base_name(path, model)
        if isinstance(layer, HeadRows) and innermost(layer).bias is not None:
            raise Refusal(f"The trained rows of {name!r} have no PEFT format: PEFT leaves out the bias of such a head.")
        first, other = stored.setdefault(layer.token_rows, (name, layer))
        if first != name and not tying:
            raise Refusal(
                f"The trained rows of {first!r} and {name!r} have no PEFT format: the weights are tied, but the model's "
                "configuration does not say so (tie_word_embeddings), and PEFT would change one of them only."
            )
        if isinstance(other, HeadRows) and not isinstance(layer, HeadRows):
            stored[layer.token_rows] = (name, layer)
    return dict(stored.values())


def _token_indices(model: nn.Module, adapter_name: str) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's ``trainable_token_indices``: ids alone where the input embedding is the only table."""
    indices = {name: list(rows.tokens) for name, rows in _stored_rows(model, adapter_name).items()}
    if list(indices) == [input_embedding(model)] and hasattr(model, "get_input_embeddings"):
        return next(iter(indices.values()))
    return indices or None


def _suffixes(layer: LoRALayer) -> dict[str, str]:
    return EMBEDDING_SUFFIXES if isinstance(layer, LoRAEmbedding) else SUFFIXES


def _resolved(config: LoRAConfig, model: nn.Module, tensors: Mapping[str, Tensor]) -> LoRAConfig:
    """Drop patterns that mean nothing in this model, which PEFT allows; the strict comparison of names comes later."""
    places = names_of(model)
    wrappable = [name for name, module in places.items() if layer_class(module) is not None]
    # PEFT takes every module whose name ends so; with a classifier it lists both names that a head may have.
    saved = tuple(name for name in places if any(name.endswith(end) for end in config.modules_to_save))
    config = replace(config, exclude=useful(config.exclude, wrappable), modules_to_save=saved)
    if config.target != ALL_LINEAR:
        target = (config.target,) if isinstance(config.target, str) else config.target
        config = replace(config, target=useful(target, wrappable) or config.target)
    names = target_names(model, replace(config, rank_pattern={}, alpha_pattern={}))

    def met(key: str) -> bool:
        return any(re.match(rf"(.*\.)?({key})$", name) for name in names)

    owners = places if config.bias == "all" else names
    if all(places[name]._parameters.get("bias") is None for name in owners):
        config = replace(config, bias="none")
    ranks = {key: rank for key, rank in config.rank_pattern.items() if met(key)}
    alphas = {key: alpha for key, alpha in config.alpha_pattern.items() if met(key)}
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _check_base(model: nn.Module, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Compare the base weights that PEFT stores beside an adapted embedding with the model's."""
    places = pristine_modules(model)
    for key in [key for key in tensors if key.endswith(_BASE_SUFFIX)]:
        name = key.removesuffix(_BASE_SUFFIX)
        if name in places:
            weight = cast(Tensor, innermost(places[name][1]).weight)
            stored = tensors[key]
            if stored.shape != weight.shape or not torch.equal(stored.to(weight.dtype), weight.detach().cpu()):
                raise Refusal(
                    f"{folder} was trained on another base: the weight of {name!r} that it stores differs from this "
                    "model's; load the base that the adapter names."
                )


def _plain(number: float) -> int | float:
    """Return a whole number as an int, which is how PEFT writes alpha."""
    return int(number) if float(number).is_integer() else number


__all__ = [
    "check_others",
    "export_factors",
    "export_peft",
    "load_peft_",
    "lora_layers",
    "peft_config",
    "peft_state",
    "read_peft",
    "write_peft",
]
