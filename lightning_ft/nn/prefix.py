"""Prefix tuning: learned keys and values that every token of every attention layer sees before its own row.

Li and Liang, 2021, https://arxiv.org/abs/2101.00190. The prefix is no part of the row: masks, caches, packed segments and
logits keep their shapes, and each segment of a packed row sees the same prefix. The row's positions begin behind it, as if
P tokens stood there, and its keys are what they are after rotation; so a prefix that starts as the keys and values of real
tokens does at first exactly what these tokens would do in front of the row (in a model that reads from left to right).

Axes: P tokens of the prefix, K key heads, d width of a head, D width of the model, m of the network, N numbers a token needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name
from lightning_ft.nn.prefix_keys import Recorder
from lightning_ft.nn.prefix_layers import PositionsBehindPrefix, PrefixAttention, PrefixNetwork
from lightning_ft.nn.prefix_places import Places, look, uses_our_attention
from lightning_ft.nn.registry import injected_layers, innermost, pristine_modules, replace_module
from lightning_ft.nn.seeding import seeded_generator

Part = Literal["encoder", "decoder", "cross"]


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix looks like.

    Args:
        length: P, how many tokens' worth of keys and values.
        network: m, the width of the paper's network that all keys and values come out of; None learns them directly.
        parts: For a model with an encoder and a decoder, whose attention gets a prefix; None: each one's on itself.
        adapter_name: Name of the prefix.

    Raises:
        Refusal: For values that mean nothing.
    """

    length: int = 20
    network: int | None = None
    parts: tuple[Part, ...] | None = None
    adapter_name: str = "prefix"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.length < 1:
            raise Refusal(f"PrefixConfig.length must be at least 1, got {self.length}.")
        if self.network is not None and self.network < 1:
            raise Refusal(f"PrefixConfig.network must be at least 1, got {self.network}.")
        if self.parts is not None and (not self.parts or set(self.parts) - {"encoder", "decoder", "cross"}):
            raise Refusal(f"PrefixConfig.parts must name encoder, decoder or cross, got {list(self.parts)}.")
        check_name(self.adapter_name, "PrefixConfig.adapter_name")


def inject_prefix(
    model: nn.Module,
    config: PrefixConfig | None = None,
    *,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    freeze_base: bool = True,
) -> dict[str, PrefixAttention]:
    """Give the attention layers of a Hugging Face model a learned prefix, in place; return them by pristine name.

    The model's attention implementation becomes this library's, which is transformers' ``sdpa`` with prefixes.

    Args:
        model: A Hugging Face model of text, without a prefix.
        config: How long the prefix is and how it is learned; None is a `PrefixConfig` of defaults.
        tokens: P ids of real tokens: the prefix starts as the keys and values that the base gives to them. None draws it at
            random, as PEFT does.
        seed: Of what is drawn.
        freeze_base: Freeze every other parameter.

    Raises:
        Refusal: Where attention or positions cannot be reached. The model is unchanged then, but for its implementation.
    """
    config = config or PrefixConfig()
    others = {layer.adapter_name for layer in injected_layers(model).values() if layer.kind == "prefix"}
    if others:
        raise Refusal(
            f"The model carries the prefix {sorted(others)[0]!r} already, and two are no more than one longer one; make "
            "that one longer."
        )
    if tokens is not None and len(tokens) != config.length:
        raise Refusal(f"inject_prefix needs {config.length} tokens, as many as the prefix is long, got {len(tokens)}.")
    if tokens is not None and config.network is not None and config.network < config.length:
        raise Refusal(
            f"A network of width {config.network} cannot give {config.length} tokens their keys and values; make it at least "
            "as wide as the prefix is long, or start at random."
        )
    uses_our_attention(model)
    places = look(model)
    chosen = _chosen(cast(Any, model), places, config)
    standing = pristine_modules(model)
    readers = _readers(model, places, {places.part[name] for name in chosen}, config)
    seen = look(model, [*tokens, tokens[0]] if len(tokens) == 1 else tokens).layers if tokens is not None else {}
    if freeze_base:
        mine = {p for layer in injected_layers(model).values() for p in layer.injected_parameters().values()}
        for parameter in model.parameters():
            if parameter not in mine:
                parameter.requires_grad_(False)
    options: Any = {"adapter_name": config.adapter_name}
    layers: dict[str, PrefixAttention] = {}
    network = _network(cast(Any, model), [places.layers[name] for name in chosen], config)
    begin = 0
    for name in chosen:
        path, module = standing[name]
        place = None if network is None else (begin, network)
        layer = PrefixAttention(
            module, places.layers[name], config.length, part=places.part[name], place=place, name=name, **options
        )
        begin += layer.numbers
        layers[name] = layer
        replace_module(model, path, layer)
    standing = pristine_modules(model)  # a rotary module may lie inside of an attention layer
    for name in readers:
        path, module = standing[name]
        replace_module(model, path, PositionsBehindPrefix(module, config.length, places.positions[name], **options))
    if network is not None:
        table = model.get_input_embeddings()  # type: ignore[operator]
        path = next(path for path, module in model.named_modules() if module is table)
        replace_module(model, path, network)
    _start(layers, network, {name: seen[name] for name in chosen} if seen else None, seed)
    return layers


def _chosen(model: Any, places: Places, config: PrefixConfig) -> list[str]:
    """The layers that get a prefix, in the order in which they run."""
    if not model.config.is_encoder_decoder:
        if config.parts is not None:
            raise Refusal(
                f"PrefixTuning.parts is for models with an encoder and a decoder, and {type(model).__name__} has one of them; "
                "leave it out."
            )
        return [name for name in places.layers if places.part[name] != "cross"]
    return [name for name in places.layers if places.part[name] in (config.parts or ("encoder", "decoder"))]


def _readers(model: nn.Module, places: Places, parts: set[str], config: PrefixConfig) -> list[str]:
    """What reads the positions of the rows that see the prefix; layers with a bias of their own know how far it is."""
    readers = [name for name in places.positions if places.part[name] in parts]
    if not places.relative and parts - {"cross"} - {places.part[name] for name in readers}:
        raise Refusal(
            f"Prefix tuning cannot move the positions of {type(model).__name__} behind the prefix: it makes them where no "
            "module can be wrapped; use LoRA, or a model that takes position ids (Llama, GPT-2, BERT, T5)."
        )
    standing = pristine_modules(model)
    for name in readers:
        rows = getattr(innermost(standing[name][1]), "num_embeddings", None)
        if rows is not None and rows <= config.length:
            raise Refusal(
                f"A prefix of {config.length} tokens leaves no room in the model's table of {rows} positions; shorten it."
            )
    return readers


def _network(model: Any, seen: list[Recorder], config: PrefixConfig) -> PrefixNetwork | None:
    if config.network is None:
        return None
    numbers = sum(t.shape[1] * t.shape[3] for one in seen for t in (one.keys, one.values) if t is not None)
    return PrefixNetwork(
        model.get_input_embeddings(), config.length, config.network, numbers, adapter_name=config.adapter_name
    )


@torch.no_grad()
def _start(
    layers: dict[str, PrefixAttention], network: PrefixNetwork | None, seen: dict[str, Recorder] | None, seed: int
) -> None:
    """First values: those that real tokens have, or drawn."""
    if network is not None:
        network.reset_parameters(seed, "prefix")
    flat: list[Tensor] = []
    for name, layer in layers.items():
        tables: list[Tensor] = []
        for own, heads, width in (
            ("keys", layer.heads, layer.key_width),
            ("values", layer.value_heads, layer.value_width),
        ):
            if seen is not None:
                tables.append(getattr(seen[name], own)[0, :, : layer.length].float())
            elif network is None:
                generator = seeded_generator(seed, f"{name}.{own}.{layer.adapter_name}")
                shape = (heads, layer.length, width)
                tables.append(torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator))
        if network is None:
            layer.fill(*tables)
        flat += [table.transpose(0, 1).flatten(1) for table in tables]
    if network is not None and seen is not None:
        network.start_at(torch.cat(flat, 1))


__all__ = [
    "PositionsBehindPrefix",
    "PrefixAttention",
    "PrefixConfig",
    "PrefixNetwork",
    "inject_prefix",
]
