"""Freezing as plain functions: which parameters a pattern means, and letting only some of them train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_ft.engine.model_parts import WORDS, blocks_in, pristine_parameters, stacks
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import is_packed
from lightning_ft.nn.registry import InjectedLayer
from lightning_ft.nn.select import LayerSpec, select

BEFORE, FREEZE_REST, THAW, NOTE, RAISE, FREEZE_NAMED, READ, LOWER = -1, 1, 2, 3, 4, 5, 6, 7
"""Order of the edits within the phase "freeze" (LoRA's is 0), each for all techniques before the next.

Those of what is thawed later stand between the others: parts that nothing trains from the start are raised, whatever is
frozen by name falls again, and what is still raised then is what will be thawed.
"""

_IN_NO_BLOCK = ("head", "embeddings")


def parameters_named(
    model: nn.Module, patterns: Sequence[str] | str, *, layers: LayerSpec | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the pristine model that patterns mean, by pristine name.

    A pattern may name a parameter (``lm_head.weight``, ``*.bias``) or a module, which means all parameters below it, or be
    one of the words ``biases``, ``norms``, ``embeddings`` and ``head``, see `lightning_ft.engine.model_parts`.

    Args:
        model: any module; parts of injected layers are never meant.
        patterns: see `lightning_ft.nn.select`.
        layers: only those inside these repeated blocks; ``head`` and ``embeddings`` lie in none and are not narrowed.

    Raises:
        Refusal: for a pattern without a match, with the nearest names; for a word whose part the model lacks.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    parameters = pristine_parameters(model)
    below: dict[str, list[str]] = {}
    for full in parameters:
        parts = full.split(".")
        for end in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:end]), []).append(full)
    chosen: set[str] = set()
    plain = [pattern for pattern in patterns if pattern not in WORDS]
    if plain:
        chosen |= {full for name in select(below, plain, layers=layers) for full in below[name]}
    for word in (pattern for pattern in patterns if pattern in WORDS):
        meant = set(WORDS[word](model))
        if layers is not None and word not in _IN_NO_BLOCK:
            blocks = blocks_in(model, layers)
            meant &= {n for stack in stacks(model) for block in stack if block.name in blocks for n in block.parameters}
            if not meant:
                raise Refusal(f"There are no {word} inside layers {layers!r}; change layers, or leave them out.")
        chosen |= meant
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def freeze_base(model: nn.Module) -> None:
    """Lets nothing of the model train but what was injected."""
    injected = {
        id(p)
        for layer in model.modules()
        if isinstance(layer, InjectedLayer)
        for p in layer.injected_parameters().values()
    }
    for parameter in model.parameters():
        if id(parameter) not in injected:
            parameter.requires_grad_(False)


def thaw(parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter]) -> None:
    """Lets parameters train; given by name, a refusal says which.

    Raises:
        Refusal: for quantised weights, which have no gradient.
    """
    for parameter in parameters.values() if isinstance(parameters, Mapping) else parameters:
        if is_packed(parameter):
            raise Refusal(
                f"{_said(parameters, parameter)} is quantised ({str(parameter.dtype).removeprefix('torch.')}) and cannot be "
                "trained in place; name parts that are not packed (norms, biases, head), leave quantize out, or use LoRA."
            )
        parameter.requires_grad_(True)


def _said(parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter], one: nn.Parameter) -> str:
    named = parameters if isinstance(parameters, Mapping) else {}
    return next((repr(name) for name, p in named.items() if p is one), "A parameter that is to be thawed")


def set_training(model: nn.Module) -> None:
    """Puts every module that holds a trained parameter itself into train mode.

    Hugging Face returns models in eval mode and Lightning leaves them so.
    """
    for part in model.modules():
        if any(p is not None and p.requires_grad for p in part._parameters.values()):
            part.training = True


def refuse_frozen(module: nn.Module, fix: str = "add a technique that trains something, or thaw.") -> None:
    """Refuses a module of which nothing trains.

    Args:
        module: any.
        fix: what to do.

    Raises:
        Refusal: no parameter requires a gradient.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise Refusal(f"Nothing is trainable: every parameter is frozen; {fix}")
