"""Where a learned prefix can enter a Hugging Face model: its attention layers, and the modules that read positions.

Both are found by running a few tokens through the model, not by names: an attention layer counts when keys and values of it
reach the attention function, a module reads positions when numbers that rise by one reach it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn import attention
from lightning_ft.nn.prefix_keys import Recorder
from lightning_ft.nn.registry import disabled, innermost, pristine_modules

_BEFORE = "past_key_values_length"
"""What models call the number of tokens before a row's first, where they pass it instead of positions."""


@dataclass
class Places:
    """What one forward pass over L tokens has shown.

    Attributes:
        layers: pristine name of each attention layer, in the order in which they run -> what it was seen to compute with.
        part: pristine name of each of them, and of what reads positions -> ``encoder``, ``decoder`` or ``cross`` (a decoder
            looking at the encoder).
        positions: pristine name of each module that reads positions -> (place, keyword) of that argument, or of the one that
            says how many tokens went before.
        relative: whether layers know positions by a bias that depends on the distance (T5) instead.
    """

    layers: dict[str, Recorder] = field(default_factory=dict)
    part: dict[str, str] = field(default_factory=dict)
    positions: dict[str, tuple[int, str]] = field(default_factory=dict)
    relative: bool = False


def uses_our_attention(model: nn.Module) -> None:
    """Lets a model's layers call this library's attention function, which knows prefixes; elsewhere equal to ``sdpa``.

    Raises:
        Refusal: a model that does not begin with token ids, or whose attention does not ask transformers' interface which
            function to call.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        raise Refusal(
            f"Prefix tuning needs one Hugging Face model of text, and {type(model).__name__} is none; use LoRA, which works on "
            "any module."
        )
    layers = dict(_candidates(model))
    if not layers:
        raise Refusal(
            f"Prefix tuning cannot reach the attention of {type(model).__name__}: none of its layers calls transformers' "
            "attention interface (a state-space model, or attention of its own); use LoRA, which needs none."
        )
    attention.register()
    for module in layers.values():
        if module.config._attn_implementation != attention.NAME:
            module.config._attn_implementation = attention.NAME


def look(model: Any, tokens: Sequence[int] | None = None) -> Places:
    """Runs a few tokens through the model, injected layers switched off, and says what was seen.

    Args:
        model: a Hugging Face model of text whose attention is ours already.
        tokens: ids to run, at least two; an encoder and a decoder both get them. None takes four ids of the vocabulary.

    Raises:
        Refusal: keys and values that never come to the attention function.
    """
    table: Any = innermost(model.get_input_embeddings())
    if tokens is None:
        padding = {getattr(table, "padding_idx", None), getattr(model.config, "pad_token_id", None)}
        some = [i for i in range(table.weight.shape[0] - 1, -1, -1) if i not in padding][:4]
        tokens = [*some[2:], *some[:2]]  # not in order, so that they are not taken for positions
    places = Places()
    with ExitStack() as stack:
        stack.enter_context(disabled(model))
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device(table.weight.device))
        for name, module in _candidates(model):
            handle = module.register_forward_pre_hook(_record(model, name, module, places), with_kwargs=True)
            stack.callback(handle.remove)
        for name, module in _position_readers(model, table):
            handle = module.register_forward_pre_hook(_watch(model, name, module, places), with_kwargs=True)
            stack.callback(handle.remove)
        ids = torch.tensor([list(tokens)], device=table.weight.device)
        body = getattr(model, "base_model", model)
        if model.config.is_encoder_decoder:
            body(input_ids=ids, decoder_input_ids=ids, use_cache=False)
        elif "use_cache" in inspect.signature(type(body).forward).parameters:
            body(input_ids=ids, use_cache=False)
        else:
            body(input_ids=ids)
    places.layers = {name: seen for name, seen in places.layers.items() if seen.keys is not None}
    if not places.layers:
        raise Refusal(
            f"Prefix tuning cannot reach the attention of {type(model).__name__}: its keys and values never come to the "
            "attention function; use LoRA, which needs none."
        )
    return places


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Pristine name and innermost module of every layer whose forward asks the attention interface for a function."""
    for name, (_, module) in pristine_modules(model).items():
        inner = innermost(module)
        code = getattr(inspect.unwrap(type(inner).forward), "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(inner, "config"):
            yield name, inner


def _position_readers(model: nn.Module, table: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Rotary modules, and embeddings other than that of the tokens."""
    for name, (_, module) in pristine_modules(model).items():
        inner = innermost(module)
        if isinstance(inner, nn.Embedding):
            if inner is not table and inner.weight is not table.weight:
                yield name, inner
        elif "Rotary" in type(inner).__name__:
            yield name, inner


def _record(model: Any, name: str, module: nn.Module, places: Places) -> Any:
    reads = _reads(model, module)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        crosses = any(kwargs.get(key) is not None for key in ("key_value_states", "encoder_hidden_states"))
        places.part.setdefault(name, "cross" if crosses else reads)
        places.relative |= hasattr(module, "compute_bias")
        return args, {**kwargs, "learned_prefix": places.layers.setdefault(name, Recorder())}

    return hook


def _watch(model: Any, name: str, module: nn.Module, places: Places) -> Any:
    parameters = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = None
        for place, keyword in enumerate(parameters):
            given = args[place] if place < len(args) else kwargs.get(keyword)
            if not isinstance(given, Tensor) or given.is_floating_point() or given.ndim == 0 or given.shape[-1] < 2:
                continue
            if bool((given.diff(dim=-1) == 1).all()):
                found = (place, keyword)
        if found is None and _BEFORE in parameters:  # it counts by itself, from what it is told
            found = (parameters.index(_BEFORE), _BEFORE)
        if found is not None:
            places.positions.setdefault(name, found)
            places.part[name] = _reads(model, module)

    return hook


def _reads(model: Any, module: nn.Module) -> str:
    """Whether a module is the encoder's; all of a model with one stack is called a decoder's."""
    if model.config.is_encoder_decoder and any(module is one for one in model.get_encoder().modules()):
        return "encoder"
    return "decoder"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
