"""LoRA adapters in the format of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names are those of the Hugging Face model that was adapted, behind ``base_model.model.``. PEFT loads a file with wrong
names without an error, as an untrained adapter; so reading is strict here, both ways, and the tests of writing compare
logits in PEFT itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.formats.atomic import atomic_folder
from lightning_ft.formats.heads import task_type, trained_head
from lightning_ft.formats.peft_reading import (
    CONFIG_FILE,
    EMBEDDING_SUFFIXES,
    PREFIX,
    ROWS_SUFFIXES,
    SUFFIXES,
    WEIGHTS_FILE,
    WRAPPED_BIAS,
    read_peft,
)
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import (
    LoRAConfig,
    adapter_configs,
    bias_parameters,
    inject_lora,
    saved_modules,
    target_names,
)
from lightning_ft.nn.lora_layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALayer, layer_class
from lightning_ft.nn.registry import base_name, injected_layers, innermost, pristine_modules, replace_module
from lightning_ft.nn.select import ALL_LINEAR, matches
from lightning_ft.nn.trainable_tokens import HeadRows, TokenRows, input_embedding

_BASE_SUFFIX = ".base_layer.weight"


def export_peft(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default", base_model_name: str | None = None
) -> Path:
    """Write a LoRA adapter, with its modules to save, as a folder that PEFT loads.

    Args:
        model: The Hugging Face model (or any module) that carries the adapter; names in the file are relative to it.
        folder: Where to write; an earlier adapter there is replaced, anything else is refused.
        adapter_name: Which adapter.
        base_model_name: Recorded so that PEFT's ``Auto`` classes find the base; None reads it from the model.

    Returns:
        The folder.

    Raises:
        Refusal: If there is no such adapter, or the format cannot express it.
    """
    _refuse_others(model, adapter_name)
    return write_peft(
        folder,
        peft_config(model, adapter_name=adapter_name, base_model_name=base_model_name),
        peft_state(model, adapter_name),
    )


def _refuse_others(model: nn.Module, adapter_name: str) -> None:
    """Refuses to leave out what was trained beside the adapter and what the format has no place for."""
    config = next(iter(_layers(model, adapter_name).values())).config
    written = {p for layer in injected_layers(model).values() for p in layer.injected_parameters().values()}
    written |= {p for module in _saved(model, config).values() for p in module.parameters()}
    written |= set(bias_parameters(model, config).values())
    others = [base_name(name, model) for name, p in model.named_parameters() if p.requires_grad and p not in written]
    if others:
        raise Refusal(
            f"{_shown(others)} trained beside the adapter, and an adapter folder has no place for single weights of the base; "
            "write the whole model with merge, or train whole modules by lora.modules_to_save."
        )


def write_peft(folder: str | Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """Write what `peft_config` and `peft_state` return, atomically; under several ranks only one calls this."""
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_folder(folder, marker=CONFIG_FILE, needed_bytes=size + 2**20) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def peft_config(
    model: nn.Module, *, adapter_name: str = "default", base_model_name: str | None = None
) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for an adapter that a model carries."""
    layers = _layers(model, adapter_name)
    config = next(iter(layers.values())).config
    places = {name: innermost(module) for name, (_, module) in pristine_modules(model).items() if name}
    for name, layer in layers.items():
        if isinstance(layer, LoRAConv2d) and set(cast("tuple[int, ...]", layer.dilation)) != {1}:
            raise Refusal(f"The adapter on {name!r} cannot be written: PEFT ignores the dilation of convolutions.")
    saved = list(_saved(model, config))
    for name in places:
        if name not in saved and any(name.endswith(end) for end in saved):
            raise Refusal(
                f"modules_to_save {saved} cannot be written: PEFT compares the ends of names and would take {name!r} "
                "as well; rename one of the modules."
            )
    hf_config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base_model_name or getattr(hf_config, "_name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": config.r,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(list(layers), list(places), saved),
        "exclude_modules": None,
        "bias": config.bias,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        # One entry a module, whole names: a suffix that the user wrote could match more in another tool.
        "rank_pattern": {f"^{re.escape(n)}": x.r for n, x in layers.items() if x.r != config.r},
        "alpha_pattern": {f"^{re.escape(n)}": _plain(x.alpha) for n, x in layers.items() if x.alpha != config.alpha},
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
    layers = _layers(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for parameter, suffix in _suffixes(layer).items():
            tensor = getattr(layer, parameter)
            if tensor is not None:
                tensor = _whole(tensor)
                is_conv_magnitude = isinstance(layer, LoRAConv2d) and parameter == "lora_magnitude"
                tensors[f"{PREFIX}{name}.{suffix}"] = tensor.view(1, -1, 1, 1) if is_conv_magnitude else tensor
    for name, module in _saved(model, next(iter(layers.values())).config).items():
        if injected_layers(module):
            raise Refusal(
                f"{name!r} is among modules_to_save and carries another adapter inside; merge or exclude that one."
            )
        tensors.update({f"{PREFIX}{name}.{key}": _whole(tensor) for key, tensor in module.state_dict().items()})
    for name, rows in _stored_rows(model, adapter_name).items():
        tensors[f"{PREFIX}{name}.{ROWS_SUFFIXES['token_rows']}"] = _whole(rows.token_rows)
    for name, bias in bias_parameters(model, next(iter(layers.values())).config).items():
        owner = name.removesuffix(".bias")
        tensors[f"{PREFIX}{owner}.{WRAPPED_BIAS}" if owner in layers else f"{PREFIX}{name}"] = _whole(bias)
    return tensors


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
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = inject_lora(model, config, freeze_base=freeze_base)
    try:
        places = {f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.injected_parameters().items()}
        places |= {f"{n}.token_rows": rows.token_rows for n, rows in _stored_rows(model, adapter_name).items()}
        places |= bias_parameters(model, config)
        for name, module in saved_modules(model, config).items():
            places.update({f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()})
        _check_base(model, tensors, folder)
        _check_keys(places, tensors, folder)
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])
    except BaseException:
        for path, layer in injected_layers(model, adapter_name).items():
            replace_module(model, path, layer.base)
        for parameter, state in before.items():
            parameter.requires_grad_(state)
        raise
    for layer in injected_layers(model, adapter_name).values():
        layer.starts_as_identity = False
    return layers


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
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


def _saved(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return what is stored whole beside the adapter: modules to save, and a new head that was trained with it."""
    listed, places = saved_modules(model, config), pristine_modules(model)
    head = [name for name in trained_head(model) if name not in listed]
    for name in head:
        if injected_layers(places[name][1]):
            raise Refusal(
                f"The head {name!r} is trained in full and carries an adapter as well, and PEFT stores one or the other; "
                "leave it out of the adapter's targets."
            )
    return listed | saved_modules(model, replace(config, modules_to_save=tuple(head)))


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


def _target_modules(chosen: list[str], names: list[str], saved: list[str]) -> list[str] | str:
    """Return PEFT's ``target_modules``: ends of names if they mean the same modules, else whole names, else a regex."""
    free = [name for name in names if not any(name == s or name.startswith(f"{s}.") for s in saved)]
    for candidate in ({name.rpartition(".")[2] for name in chosen}, set(chosen)):
        if [name for name in free if any(matches(name, end) for end in candidate)] == [
            n for n in free if n in set(chosen)
        ]:
            return sorted(candidate)
    return "|".join(re.escape(name) for name in chosen)


def _resolved(config: LoRAConfig, model: nn.Module, tensors: Mapping[str, Tensor]) -> LoRAConfig:
    """Drop patterns that mean nothing in this model, which PEFT allows; the strict comparison of names comes later."""
    places = {name: innermost(module) for name, (_, module) in pristine_modules(model).items() if name}
    wrappable = [name for name, module in places.items() if layer_class(module) is not None]

    def useful(patterns: tuple[str, ...] | str) -> tuple[str, ...]:
        listed = (patterns,) if isinstance(patterns, str) else patterns
        return tuple(p for p in listed if any(matches(name, p) for name in wrappable))

    # PEFT takes every module whose name ends so; with a classifier it lists both names that a head may have.
    saved = tuple(name for name in places if any(name.endswith(end) for end in config.modules_to_save))
    config = replace(config, exclude=useful(config.exclude), modules_to_save=saved)
    if config.target != ALL_LINEAR:
        config = replace(config, target=useful(config.target) or config.target)
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


def _check_keys(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Refuse tensors that are missing, left over, or of another shape than the model's."""
    found = {key for key in tensors if not key.endswith(_BASE_SUFFIX)}
    missing, left_over = sorted(set(places) - found), sorted(found - set(places))
    if missing or left_over:
        raise Refusal(
            f"{folder} does not fit this model: missing {_shown(missing)}; not expected {_shown(left_over)}; load "
            "the base that the adapter was trained on."
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise Refusal(
                f"{folder} was trained on another base: {name!r} is {tuple(tensors[name].shape)} in the file and "
                f"{tuple(place.shape)} in this model."
            )


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain(number: float) -> int | float:
    """Return a whole number as an int, which is how PEFT writes alpha."""
    return int(number) if float(number).is_integer() else number


def _shown(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


__all__ = ["export_peft", "load_peft_", "peft_config", "peft_state", "read_peft", "write_peft"]
