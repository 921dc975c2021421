"""AdapterHub's folders (the ``adapters`` library): ``adapter_config.json`` with ``adapter.safetensors``, both ways.

What a file means is decided by its flags, not by its keys. With ``s`` the sublayer's output after dropout, ``r`` the stream
before the sublayer and ``LN`` the block's own norm, which post-norm models have behind the sum:

================  ======================================  ===========================================
style here        flags there                             the block goes on with
================  ======================================  ===========================================
``houlsby``       original_ln_before false                ``s + f(s) + r``, post-norm ``LN`` of it
``pfeiffer``      original_ln_before true                 ``s + f(s + r) + r``, post-norm
                                                          ``LN(s + f(LN(s + r)) + r)``
``parallel``      is_parallel true                        ``s + f(r) + r``, post-norm ``LN`` of it
================  ======================================  ===========================================

with ``original_ln_after`` and ``residual_before_ln`` true in all three. Other flags are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ft.formats.adapterhub_reading import (
    CONFIG_FILE,
    INITS,
    LEGACY_PARTS,
    PARTS,
    VERSION,
    WEIGHTS_FILE,
    read_adapterhub,
)
from lightning_ft.formats.atomic import write_folder
from lightning_ft.formats.heads import trained_head
from lightning_ft.formats.peft_folder import refuse_others, shown, whole, whole_or_not_at_all
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.bottleneck import bottleneck_layers, inject_bottleneck
from lightning_ft.nn.bottleneck_layers import BottleneckLayer
from lightning_ft.nn.sublayers import Sublayer, sublayers

# Layout and kind of a sublayer -> where below the block AdapterHub keeps its adapters; for these architectures.
_PLACES: dict[tuple[str, str], str] = {
    ("llama", "attention"): "attention_adapters",
    ("llama", "feed_forward"): "output_adapters",
    ("gpt2", "attention"): "attention_adapters",
    ("gpt2", "feed_forward"): "output_adapters",
    ("bert", "attention"): "attention.output",
    ("bert", "feed_forward"): "output",
    ("distilbert", "attention"): "attention_adapters",
    ("distilbert", "feed_forward"): "output_adapters",
    ("t5 encoder", "attention"): "layer.0",
    ("t5 encoder", "feed_forward"): "layer.1",
    ("t5 decoder", "attention"): "layer.0",
    ("t5 decoder", "cross_attention"): "layer.1",
    ("t5 decoder", "feed_forward"): "layer.2",
}
MODEL_TYPES = ("bert", "distilbert", "electra", "gpt2", "llama", "mistral", "mt5", "roberta", "t5", "xlm-roberta")
_FLAGS = {"attention": "mh_adapter", "feed_forward": "output_adapter", "cross_attention": "cross_adapter"}


def export_adapterhub(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "adapter", without_head: bool = False
) -> Path:
    """Write a bottleneck adapter as a folder that ``model.load_adapter(folder, use_safetensors=True)`` of AdapterHub loads.

    Args:
        model: The Hugging Face model that carries the adapter.
        folder: The folder; an earlier adapter in it is replaced, anything else refused.
        adapter_name: Which adapter; the name is part of the file's keys.
        without_head: Write a classifier's adapter although its trained head is no part of the folder.

    Raises:
        Refusal: If the model carries no such adapter, or what AdapterHub cannot express. Nothing is written then.
    """
    check_beside(model, without_head=without_head)
    return write_adapterhub(folder, adapterhub_config(model, adapter_name), adapterhub_state(model, adapter_name))


def write_adapterhub(folder: str | Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """Write a configuration and tensors under AdapterHub's names, atomically; under several ranks only one calls this."""
    return write_folder(folder, config, tensors, config_file=CONFIG_FILE, weights_file=WEIGHTS_FILE)


def adapterhub_config(model: nn.Module, adapter_name: str = "adapter") -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for an adapter that a model carries.

    Raises:
        Refusal: If AdapterHub has no such model, or puts no adapter where this one has one.
    """
    layers = bottleneck_layers(model, adapter_name)
    hf: Any = getattr(model, "config", None)
    model_type = getattr(hf, "model_type", None)
    if model_type not in MODEL_TYPES:
        raise Refusal(
            f"The adapter of {type(model).__name__} cannot be written: AdapterHub's format is known here for "
            f"{', '.join(MODEL_TYPES)}; keep the checkpoint."
        )
    config, present = layers[0].recipe, [_place(layer) for layer in layers]
    kinds = {place.kind for place in present}
    adapted = {place.number for place in present}
    every = sublayers(model)
    for place in every:
        if place.number in adapted and place.kind in kinds and place not in present:
            raise Refusal(
                f"The adapter cannot be written: AdapterHub leaves out whole blocks only, and of {place.block!r} only the "
                f"{place.kind} has none; keep the checkpoint."
            )
    factors: float | dict[str, float] = config.reduction_factor
    if config.reduction_factors:
        factors = {**config.reduction_factors, "default": config.reduction_factor}
    return {
        "config": {
            **{flag: kind in kinds for kind, flag in _FLAGS.items()},
            "reduction_factor": factors,
            "non_linearity": config.non_linearity,
            "original_ln_before": config.style == "pfeiffer",
            "original_ln_after": True,
            "ln_before": config.norm_before,
            "ln_after": config.norm_after,
            "init_weights": INITS[config.init],
            "init_weights_seed": None,
            "is_parallel": config.style == "parallel",
            "scaling": config.scale if isinstance(config.scale, str) else float(config.scale),
            "use_gating": False,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
            "inv_adapter": None,
            "inv_adapter_reduction_factor": None,
            "leave_out": sorted({place.number for place in every} - adapted),
            "dropout": config.dropout,
            "phm_layer": False,
            "phm_dim": 4,
            "factorized_phm_W": True,
            "shared_W_phm": False,
            "shared_phm_rule": True,
            "factorized_phm_rule": False,
            "phm_c_init": "normal",
            "phm_init_range": 0.0001,
            "learn_phm": True,
            "hypercomplex_nonlinearity": "glorot-uniform",
            "phm_rank": 1,
            "phm_bias": True,
            "stochastic_depth": 0.0,
        },
        "hidden_size": getattr(hf, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(hf, "_name_or_path", None) or None,
        "model_type": model_type,
        "name": adapter_name,
        "version": VERSION,
    }


def adapterhub_state(model: nn.Module, adapter_name: str = "adapter") -> dict[str, Tensor]:
    """Return an adapter's tensors under AdapterHub's names; under FSDP2 they are gathered, so every rank calls this."""
    return {
        key: whole(tensor)
        for layer in bottleneck_layers(model, adapter_name)
        for key, tensor in _named(layer, adapter_name).items()
    }


def load_adapterhub_(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "adapter",
    dropout: float | None = None,
    freeze_base: bool = True,
) -> list[BottleneckLayer]:
    """Inject the adapter of a folder into a model, in place, with its stored values.

    Args:
        model: The model that the adapter was trained on, without it; a model with a head takes files of a bare one and the
            other way round.
        folder: A folder as AdapterHub or `export_adapterhub` writes it, with ``adapter.safetensors`` or ``pytorch_adapter.bin``.
        adapter_name: Name to give the adapter.
        dropout: Dropout for training on; None takes the stored one.
        freeze_base: As in `inject_bottleneck`.

    Returns:
        The injected layers, in model order.

    Raises:
        Refusal: As in `read_adapterhub`; if a tensor is missing, left over or of another shape. The model is unchanged then.
    """
    folder = Path(folder)
    config, name, leave_out, tensors = read_adapterhub(folder)
    every = sublayers(model)
    blocks = {place.number: place.block for place in every}
    unknown = sorted(set(leave_out) - set(blocks))
    if unknown:
        raise Refusal(f"{folder} leaves out block {unknown[0]}, but this model has blocks 0 to {len(blocks) - 1}.")
    config = replace(
        config,
        adapter_name=adapter_name,
        exclude=tuple(blocks[number] for number in leave_out),
        places=tuple(kind for kind in config.places if kind in {place.kind for place in every}),
        dropout=config.dropout if dropout is None else dropout,
    )
    with whole_or_not_at_all(model):
        layers = list(inject_bottleneck(model, config, freeze_base=freeze_base).values())
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        places = {k.removeprefix(prefix): t for x in layers for k, t in _named(x, name).items()}
        found = {_current(key).removeprefix(prefix): tensor for key, tensor in tensors.items()}
        missing, left_over = sorted(set(places) - set(found)), sorted(set(found) - set(places))
        # With a norm before, AdapterHub's model holds it under two names, and a file without one of them is as good.
        missing = [key for key in missing if not (config.norm_before and ".adapter_norm_before." in key)]
        if missing or left_over:
            raise Refusal(
                f"{folder} does not fit this model: missing {shown(missing)}; not expected {shown(left_over)}; load the "
                "base that the adapter was trained on."
            )
        with torch.no_grad():
            for key, tensor in found.items():
                if places[key].shape != tensor.shape:
                    raise Refusal(
                        f"{folder} was trained on another base: {key!r} is {tuple(tensor.shape)} in the file and "
                        f"{tuple(places[key].shape)} in this model."
                    )
                places[key].copy_(tensor)
    for layer in layers:
        layer.starts_as_identity = False
    return layers


def check_beside(model: nn.Module, *, without_head: bool = False, late: Collection[str] = ()) -> None:
    """Refuse to leave out what was trained beside the adapter, or will be (``late``, names of parameters that are frozen now)."""
    head = trained_head(model)
    if head and not without_head:
        raise Refusal(
            f"{type(model).__name__} has a head that was trained with the adapter, and this format has no place for it; pass "
            "without_head=True, and keep the head's weights yourself."
        )
    refuse_others(model, head, late=late)


def _named(layer: BottleneckLayer, name: str) -> dict[str, Tensor]:
    """Return a layer's parameters under AdapterHub's names."""
    place = _place(layer)
    prefix = f"{place.block}.{_PLACES[place.layout, place.kind]}.adapters.{name}."
    parts = dict(PARTS)
    found: dict[str, Tensor] = {}
    if layer.recipe.norm_before:  # the norm comes first in the sequence, and has a name of its own as well
        for end in ("weight", "bias"):
            parts[f"down_{end}"] = f"adapter_down.1.{end}"
            norm = cast(Tensor, getattr(layer, f"norm_before_{end}"))
            found[f"{prefix}adapter_norm_before.{end}"] = found[f"{prefix}adapter_down.0.{end}"] = norm
    for key, part in parts.items():
        tensor = getattr(layer, key)
        if tensor is not None:
            found[f"{prefix}{part}"] = tensor
    return found


def _place(layer: BottleneckLayer) -> Sublayer:
    """Return the sublayer that a layer stands at."""
    place = layer.sublayer
    if place is None or (place.layout, place.kind) not in _PLACES:
        raise Refusal(
            f"The adapter on {layer.name!r} cannot be written: AdapterHub puts adapters at the sublayers of blocks that it "
            "knows, not at modules named by target; keep the checkpoint."
        )
    return place


def _current(key: str) -> str:
    """Return a key as AdapterHub writes it today; files of its first versions name the places otherwise."""
    for old in LEGACY_PARTS:
        key = key.replace(f".{old}.", ".adapters.")
    return key


__all__ = [
    "MODEL_TYPES",
    "adapterhub_config",
    "adapterhub_state",
    "check_beside",
    "export_adapterhub",
    "load_adapterhub_",
    "read_adapterhub",
    "write_adapterhub",
]
