"""The parts of a model that have a word: its head, embeddings, norms and biases, and its stacks of repeated blocks.

Names are the pristine ones that parameters have from the model's root, so that they mean the same with and without
injected layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost, pristine_modules
from lightning_ft.nn.select import LayerSpec, block_lists, layer_index, select

_BIAS = re.compile(
    r"(^|_)bias($|_)"
)  # bias, in_proj_bias, bias_ih_l0, bias_k; a matrix named relative_bias.weight is none
_POSITION = re.compile(r"pos(ition)?_emb")  # vision models keep theirs as bare parameters


def pristine_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the model before injection, by pristine name; a tied one under each of its names."""
    found = {}
    for name, (_, module) in pristine_modules(model).items():
        for key, parameter in innermost(module)._parameters.items():
            if parameter is not None:
                found[f"{name}.{key}" if name else key] = parameter
    return found


def head_names(model: nn.Module) -> list[str]:
    """Parameters of the head: all outside the backbone, and the output embedding; else the last module that has any.

    A Hugging Face model says which part is its backbone. In any other net the head is the last module that holds
    parameters, as the net lists them.

    Raises:
        Refusal: for a Hugging Face model that is a bare backbone.
    """
    names = list(pristine_parameters(model))
    if not hasattr(model, "get_output_embeddings"):
        last = names[-1].rpartition(".")[0] if names else ""
        return [name for name in names if name.rpartition(".")[0] == last]
    backbone, output = getattr(model, "base_model", model), _ends(model, "output")
    inside = {id(m) for m in backbone.modules()}
    end = {id(m) for m in output.modules()} if output is not None else set()
    holders = {n for n, (_, m) in pristine_modules(model).items() if id(m) not in inside or id(m) in end}
    found = {name for name in names if name.rpartition(".")[0] in holders}
    if not found:
        raise Refusal(
            f"{type(model).__name__} has no head: it is a backbone alone; name what trains, or load the model for a task."
        )
    return [name for name in names if name in found]


def embedding_names(model: nn.Module) -> list[str]:
    """Parameters of the input and position embeddings (token types too): what turns ids into vectors, outside the blocks.

    Raises:
        Refusal: when the model has none.
    """
    entrance = _ends(model, "input")
    tables = [innermost(m) for _, m in pristine_modules(model).values() if isinstance(innermost(m), nn.Embedding)]
    tables += [entrance] if entrance is not None else []
    owned = {id(p) for table in tables for p in table.parameters()}
    elsewhere = {name for stack in stacks(model) for block in stack for name in block.parameters}
    if getattr(model, "base_model", model) is not model:
        elsewhere |= set(head_names(model))  # of a tied pair the name at the input's side
    found = [
        name
        for name, p in pristine_parameters(model).items()
        if name not in elsewhere and (id(p) in owned or _POSITION.search(name.rpartition(".")[2]))
    ]
    if not found:
        raise Refusal(f"{type(model).__name__} has no embeddings; name the modules that you mean.")
    return found


def norm_names(model: nn.Module) -> list[str]:
    """Scales and shifts of normalisation layers, which are known by the name of their class.

    Raises:
        Refusal: when the model has none.
    """
    found = [
        f"{name}.{key}" if name else key
        for name, (_, module) in pristine_modules(model).items()
        if "norm" in type(innermost(module)).__name__.lower()
        for key, parameter in innermost(module)._parameters.items()
        if parameter is not None
    ]
    if not found:
        raise Refusal(f"{type(model).__name__} has no normalisation layers with parameters; name other parts.")
    return found


def bias_names(model: nn.Module) -> list[str]:
    """Every bias, those of norms included (Ben Zaken et al., 2022).

    Raises:
        Refusal: when the model has none, as Llama and its relatives.
    """
    found = [name for name in pristine_parameters(model) if _BIAS.search(name.rpartition(".")[2])]
    if not found:
        raise Refusal(
            f"{type(model).__name__} has no biases, so training biases alone (BitFit) would train nothing; train 'norms' "
            "instead, or use LoRA."
        )
    return found


WORDS: dict[str, Callable[[nn.Module], list[str]]] = {
    "biases": bias_names,
    "embeddings": embedding_names,
    "head": head_names,
    "norms": norm_names,
}
"""Words that stand for a part wherever a pattern may stand."""


@dataclass(frozen=True)
class Block:
    """One repeated block: its name, its number in its list, and its parameters by pristine name."""

    name: str
    index: int
    parameters: tuple[str, ...]


def stacks(model: nn.Module) -> list[list[Block]]:
    """The repeated blocks from the input's side to the output's; an encoder-decoder has two stacks, its encoder first.

    Blocks are the members of numbered lists that hold parameters, the outermost ones. Of a Hugging Face model only those of
    the backbone count. In any other net several lists are one stack, in the order in which the net lists them.
    """
    names = list(pristine_parameters(model))
    sizes = block_lists(names)
    outside = set(head_names(model)) if getattr(model, "base_model", model) is not model else set()
    members: dict[tuple[str, int], list[str]] = {}
    for name in names:
        at = layer_index(name, sizes)
        if at is not None:
            members.setdefault(at, []).append(name)
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    found: dict[str, list[Block]] = {}
    for (prefix, index), inside in members.items():
        if set(inside) <= outside:
            continue
        stack = ("decoder" if "decoder" in prefix.split(".") else "encoder") if two else ""
        block = Block(f"{prefix}.{index}" if prefix else str(index), index, tuple(inside))
        found.setdefault(stack, []).append(block)
    return [found[stack] for stack in sorted(found, reverse=True)]  # "encoder" before "decoder"


def top_blocks(model: nn.Module, share: float) -> list[Block]:
    """The share of each stack's blocks that is nearest to the output: rounded up, at least one.

    Raises:
        Refusal: when the model repeats no blocks.
    """
    found = stacks(model)
    if not found:
        raise Refusal(
            f"{type(model).__name__} has no numbered blocks to take a share of; name the modules that you mean."
        )
    chosen = []
    for stack in found:
        # 0.1 of 30 is 3: rounding up must not see 3.0000000000000004.
        chosen += stack[-max(1, math.ceil(round(share * len(stack), 9))) :]
    return chosen


def blocks_in(model: nn.Module, layers: LayerSpec) -> set[str]:
    """Names of the blocks that a layer specification means, see `lightning_ft.nn.select`."""
    inside = {name: block.name for stack in stacks(model) for block in stack for name in block.parameters}
    return {inside[name] for name in select(list(inside), "*", layers=layers)}


def _ends(model: nn.Module, end: Literal["input", "output"]) -> nn.Module | None:
    """The embedding at one end of a Hugging Face model, if it has one."""
    ask: Any = getattr(model, f"get_{end}_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # so a model without ids says that it has none
        return None
    return found if isinstance(found, nn.Module) else None
