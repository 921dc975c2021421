"""Soft prompts in the format of Hugging Face PEFT (``PROMPT_TUNING``), both ways.

The folder holds one table, ``prompt_embeddings``, and what was trained whole beside it (the head of a classifier) behind
``base_model.``, without the ``model.`` of other methods. PEFT lays the prompt before the row by calling the whole model with
embeddings, so a head that reads the first place reads the prompt's first state there, as it does here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ft.formats.heads import task_type
from lightning_ft.formats.peft_folder import (
    common_config,
    fill_head_,
    head_places,
    stored_names,
    stored_state,
    whole,
)
from lightning_ft.formats.peft_reading import CONFIG_FILE, PREFIX, read_json, read_tensors
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prompt import PromptTokens, inject_prompt
from lightning_ft.nn.prompt_places import prompt_place
from lightning_ft.nn.registry import injected_layers, innermost

_KEY, _HEAD = "prompt_embeddings", "base_model."
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


def is_prompt(model: nn.Module, adapter_name: str) -> bool:
    """Say whether an adapter of a model is a soft prompt."""
    return any(isinstance(layer, PromptTokens) for layer in injected_layers(model, adapter_name).values())


def prompt_config(
    model: nn.Module, *, adapter_name: str = "prompt", base_model_name: str | None = None
) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for a soft prompt that a model carries.

    Raises:
        Refusal: If PEFT would compute something else with it.
    """
    layer = _layer(model, adapter_name)
    _check_task(model)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        **common_config(model, "PROMPT_TUNING", base_model_name),
        "num_virtual_tokens": layer.tokens,
        "token_dim": layer.prompt.shape[1],
        "num_transformer_submodules": 1,  # with two, PEFT keeps a second table for a decoder, which it never reads
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "prompt_tuning_init": "RANDOM",  # anything else would make a loader ask for a tokenizer
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
        "modules_to_save": stored_names(model, ()) or None,
    }


def prompt_state(model: nn.Module, adapter_name: str = "prompt") -> dict[str, Tensor]:
    """Return the tensors of a soft prompt under PEFT's names; under FSDP2 they are gathered, so every rank calls this."""
    head = {f"{_HEAD}{key.removeprefix(PREFIX)}": tensor for key, tensor in stored_state(model, ()).items()}
    return {_KEY: _table(_layer(model, adapter_name)), **head}


def read_prompt(folder: str | Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Read a folder of PEFT's: the prompt (P, D), and the parameters stored beside it by their names in the model.

    Raises:
        Refusal: If the folder holds no soft prompt, or a damaged one.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "PROMPT_TUNING":
        raise Refusal(
            f"{folder} holds an adapter of type {raw.get('peft_type')}, not PROMPT_TUNING; load it with that technique."
        )
    tensors = read_tensors(folder)
    tokens, table = raw.get("num_virtual_tokens"), tensors.pop(_KEY, None)
    if not isinstance(tokens, int) or tokens < 1 or table is None or table.dim() != 2 or len(table) < tokens:
        raise Refusal(f"{folder} is damaged or incomplete: it lacks a table {_KEY!r} of num_virtual_tokens rows.")
    # The rows after those are the ones that PEFT keeps for a decoder and never reads.
    return table[:tokens], {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}


def load_peft_prompt_(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "prompt",
    target: str | None = None,
    network: int | None = None,
    seed: int = 0,
    freeze_base: bool = True,
) -> PromptTokens:
    """Inject the soft prompt of a folder into a model, in place, with its stored values and those of a stored head.

    Args:
        model: The model that the prompt was trained on, without it.
        folder: A folder as PEFT or `lightning_ft.formats.peft.export_peft` writes it.
        adapter_name: Name to give the prompt.
        target: Name of the embedding, as in `inject_prompt`.
        network: Width of a network that starts around the stored vectors, as in `inject_prompt`.
        seed: Of what the network draws.
        freeze_base: As in `inject_prompt`; a stored head trains on.

    Raises:
        Refusal: As in `read_prompt`; if it is of another width, or the head does not fit. The model is unchanged then.
    """
    table, head = read_prompt(folder)
    places = head_places(model, head, folder)
    width = cast(Tensor, innermost(model.get_submodule(prompt_place(model, target)[0])).weight).shape[1]
    if table.shape[1] != width:
        raise Refusal(
            f"{folder} was trained on another base: its prompt is {table.shape[1]} wide, this model's embedding {width}."
        )
    options: Any = {"target": target, "network": network, "adapter_name": adapter_name, "seed": seed}
    layer = inject_prompt(model, len(table), start="random", **options, freeze_base=freeze_base)
    with torch.no_grad():
        layer.prompt.copy_(table)
    fill_head_(places, head)
    return layer


@torch.no_grad()
def _table(layer: PromptTokens) -> Tensor:
    """The vectors that stand before the row, without the network that they may come out of."""
    if layer.network is None:
        return whole(layer.prompt)
    state = {name: whole(parameter).to(layer.prompt.dtype) for name, parameter in layer.network.named_parameters()}
    return cast(Tensor, functional_call(layer.network, state, (whole(layer.prompt),))).contiguous()


def _layer(model: nn.Module, adapter_name: str) -> PromptTokens:
    found = [x for x in injected_layers(model, adapter_name).values() if isinstance(x, PromptTokens)]
    if not found:
        names = sorted({x.adapter_name for x in injected_layers(model).values() if isinstance(x, PromptTokens)})
        raise Refusal(f"The model carries no soft prompt called {adapter_name!r}; it carries: {names or 'none'}.")
    return found[0]


def _check_task(model: nn.Module) -> None:
    """Refuse what PEFT would compute otherwise than it was trained here."""
    task, config = task_type(model), getattr(model, "config", None)
    why = None
    if task not in _TASKS:
        why = f"PEFT has no task for a {type(model).__name__}"
    elif task in ("SEQ_CLS", "TOKEN_CLS") and getattr(config, "is_encoder_decoder", False):
        why = "PEFT looks for the end of the text among ids that it does not pass on"
    elif task == "SEQ_CLS" and getattr(config, "classifier_pooling", "cls") == "mean":
        why = "the head takes a mean, in PEFT also over the prompt's places"
    if why is not None:
        raise Refusal(f"This soft prompt cannot be written in PEFT's format, because {why}; keep the checkpoint.")
