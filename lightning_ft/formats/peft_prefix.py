"""Prefixes in the format of Hugging Face PEFT (``PREFIX_TUNING``), both ways.

The folder holds one table, ``prompt_embeddings`` (P, 2 L K d): of each token the keys of layer 0, its values, the keys of
layer 1 and so on; and what was trained whole beside it (the head of a classifier) behind ``base_model.``. The network that a
prefix may come out of has no place there, as in PEFT's own files: the table is what it gives.

With an encoder, PEFT gives a prefix to the decoder alone, doubles the table and cuts it into pieces of four, of which it
reads the first two; so layer l has columns 4 l and 4 l + 1 of the doubled table. Of a table of 2 L columns half are never
read and layers share the others; a folder written here therefore says that it has 2 L layers, which gives each its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.formats.heads import task_type
from lightning_ft.formats.peft_folder import (
    common_config,
    fill_head_,
    head_places,
    stored_names,
    stored_state,
    whole,
    whole_or_not_at_all,
)
from lightning_ft.formats.peft_reading import CONFIG_FILE, PREFIX, read_json, read_tensors
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prefix import PrefixAttention, PrefixConfig, inject_prefix
from lightning_ft.nn.registry import injected_layers

_KEY, _HEAD = "prompt_embeddings", "base_model."
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


def is_prefix(model: nn.Module, adapter_name: str) -> bool:
    """Say whether an adapter of a model is a prefix."""
    return any(layer.kind == "prefix" for layer in injected_layers(model, adapter_name).values())


def prefix_config(
    model: nn.Module, *, adapter_name: str = "prefix", base_model_name: str | None = None
) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for a prefix that a model carries.

    Raises:
        Refusal: If PEFT would compute something else with it.
    """
    layers = list(_layers(model, adapter_name).values())
    doubled = _doubles(model)
    first = layers[0]
    return {
        **common_config(model, "PREFIX_TUNING", base_model_name),
        "num_virtual_tokens": first.length,
        "token_dim": first.heads * first.key_width,
        "num_transformer_submodules": 2 if doubled else 1,
        "num_attention_heads": first.heads,
        "num_layers": len(layers) * (2 if doubled else 1),
        "encoder_hidden_size": first.heads * first.key_width,
        "prefix_projection": False,
        "init_weights": None,
        "modules_to_save": stored_names(model, ()) or None,
    }


def prefix_state(model: nn.Module, adapter_name: str = "prefix") -> dict[str, Tensor]:
    """Return the tensors of a prefix under PEFT's names; under FSDP2 they are gathered, so every rank calls this."""
    columns: list[Tensor] = []
    for layer in _layers(model, adapter_name).values():
        pair = [whole(table).transpose(0, 1).flatten(1) for table in layer.table()]  # (P, K d)
        columns += [*pair, *map(torch.zeros_like, pair)] if _doubles(model) else pair
    head = {f"{_HEAD}{key.removeprefix(PREFIX)}": tensor for key, tensor in stored_state(model, ()).items()}
    return {_KEY: torch.cat(columns, 1), **head}


def read_prefix(folder: str | Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Read a folder of PEFT's: the table (P, 2 L, K, d), and the parameters stored beside it by their names in the model.

    Raises:
        Refusal: If the folder holds no prefix, or a damaged one.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "PREFIX_TUNING":
        raise Refusal(
            f"{folder} holds an adapter of type {raw.get('peft_type')}, not PREFIX_TUNING; load it with that technique."
        )
    tensors = read_tensors(folder)
    table = tensors.pop(_KEY, None)
    sizes: list[Any] = [
        raw.get(key) for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    ]
    if table is None or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise Refusal(f"{folder} is damaged or incomplete: it lacks a table {_KEY!r} or the sizes of it.")
    tokens, layers, heads, width = sizes
    if width % heads or table.shape != (tokens, 2 * layers * width):
        raise Refusal(
            f"{folder} is damaged or incomplete: its table is {tuple(table.shape)}, and {tokens} tokens of {layers} layers of "
            f"{heads} heads, {width} wide together, make another one."
        )
    return (
        table.view(tokens, 2 * layers, heads, width // heads),
        {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()},
    )


def load_peft_prefix_(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "prefix", freeze_base: bool = True
) -> dict[str, PrefixAttention]:
    """Inject the prefix of a folder into a model, in place, with its stored values and those of a stored head; it can train on.

    Args:
        model: The model that the prefix was trained on, without it.
        folder: A folder as PEFT or `lightning_ft.formats.peft.export_peft` writes it.
        adapter_name: Name to give the prefix.
        freeze_base: As in `inject_prefix`; a stored head trains on.

    Returns:
        The layers by pristine name.

    Raises:
        Refusal: As in `read_prefix`; if it is of another shape, or the head does not fit. The model is unchanged then.
    """
    table, head = read_prefix(folder)
    places = head_places(model, head, folder)
    parts: Any = ("decoder",) if _doubles(model) else None
    config = PrefixConfig(length=len(table), parts=parts, adapter_name=adapter_name)
    columns = torch.cat([table, table], 1) if _doubles(model) else table
    step = 4 if _doubles(model) else 2
    heads, width = table.shape[2:]
    with whole_or_not_at_all(model):
        layers = inject_prefix(model, config, freeze_base=freeze_base)
        shapes = {(layer.heads, layer.key_width, layer.value_heads, layer.value_width) for layer in layers.values()}
        if shapes != {(heads, width, heads, width)} or columns.shape[1] // step < len(layers):
            raise Refusal(
                f"{folder} was trained on another base: its prefix has {table.shape[1] // 2} layers of {heads} heads of {width}, "
                f"and this model's attention is otherwise ({len(layers)} layers); load the base that it was trained on."
            )
    for number, layer in enumerate(layers.values()):
        keys, values = columns[:, step * number], columns[:, step * number + 1]  # (P, K, d)
        layer.fill(keys.transpose(0, 1), values.transpose(0, 1))
    fill_head_(places, head)
    return layers


def _doubles(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _layers(model: nn.Module, adapter_name: str) -> dict[str, PrefixAttention]:
    """The layers of one prefix by their path, in the order of the blocks.

    Raises:
        Refusal: Where PEFT would compute something else.
    """
    found = injected_layers(model, adapter_name).items()
    layers = {path: layer for path, layer in found if isinstance(layer, PrefixAttention)}
    if not layers:
        raise Refusal(f"The model carries no prefix called {adapter_name!r}; name one that it carries.")
    task, name = task_type(model), type(model).__name__
    if task in ("SEQ_CLS", "TOKEN_CLS") and _doubles(model):
        raise Refusal(
            f"The prefix of {name} cannot be written: PEFT has one for its encoder-decoder only where it writes text."
        )
    if task not in _TASKS:
        raise Refusal(f"PEFT has no prefix for {name}, a model that is for none of {', '.join(_TASKS)}.")
    if any(layer.part != "decoder" for layer in layers.values()):
        raise Refusal(
            "PEFT gives a prefix to a decoder's attention on itself alone, and this one is elsewhere too; train with "
            "--prefix.parts '[decoder]', or keep the checkpoint of this library."
        )
    shapes = {(x.heads, x.key_width, x.value_heads, x.value_width) for x in layers.values()}
    config: Any = model.config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_decoder_layers", None) or getattr(text, "num_hidden_layers", len(layers))
    heads, width, value_heads, value_width = next(iter(shapes))
    if len(shapes) > 1 or (heads, width) != (value_heads, value_width) or count != len(layers):
        raise Refusal(
            f"The prefix of {name} cannot be written: PEFT's table has the same heads in every block and no block without."
        )
    windows = [layer.window for layer in layers.values() if layer.window is not None]
    if windows:
        raise Refusal(
            f"The prefix of {name} cannot be written: its attention has a window of {min(windows)} tokens, out of which PEFT lets "
            "a prefix slide, while here every token sees it; keep the checkpoint of this library."
        )
    return layers


__all__ = [
    "is_prefix",
    "load_peft_prefix_",
    "prefix_config",
    "prefix_state",
    "read_prefix",
]
