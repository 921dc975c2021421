"""A student out of its teacher's own layers: the same model with some of its blocks (Sanh et al., 2019, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from lightning_ft.engine.model_parts import stacks
from lightning_ft.functional.errors import Refusal


def check_layers(layers: Sequence[int], blocks: int, name: str) -> None:
    """Refuses numbers that are no ascending ones of so many blocks of a model of this name."""
    wrong = [n for n in layers if not 0 <= n < blocks]
    if wrong or list(layers) != sorted(set(layers)) or not layers:
        raise Refusal(
            f"layers must be ascending numbers from 0 to {blocks - 1}, the blocks of {name}, got {list(layers)}."
        )


@torch.no_grad()
def with_layers(model: Any, layers: Sequence[int]) -> Any:
    """A new model that holds some of a model's blocks, in that order, and everything else of it.

    Args:
        model: a transformers model whose blocks are one stack; it is not changed.
        layers: numbers of blocks, from 0, ascending.

    Returns:
        A model of the same class and dtype, whose configuration has as many blocks.

    Raises:
        Refusal: there is no such block, no one stack, or the configuration does not count it.
    """
    name, found = type(model).__name__, stacks(model)
    if len(found) != 1 or len({block.name.rpartition(".")[0] for block in found[0]}) != 1:
        raise Refusal(f"{name} has no one stack of blocks to choose from; distill-init takes encoders and decoders.")
    blocks = found[0]
    check_layers(layers, len(blocks), name)
    config = copy.deepcopy(model.config)
    if getattr(config, "num_hidden_layers", None) != len(blocks):
        raise Refusal(f"The configuration of {name} does not count its {len(blocks)} blocks; make the student by hand.")
    for key, value in list(config.to_dict().items()):
        if isinstance(value, list) and len(value) == len(blocks):  # what each layer is (layer_types), say
            setattr(config, key, [value[n] for n in layers])
    config.num_hidden_layers = len(layers)
    prefix = blocks[0].name.rpartition(".")[0]
    with torch.random.fork_rng(devices=[]):
        student = type(model)(config)
    student = student.to(next(model.parameters()).dtype).eval()
    new_number = {old: new for new, old in enumerate(layers)}
    state = {}
    for key, value in model.state_dict().items():
        rest = key.removeprefix(f"{prefix}.")
        if rest == key:
            state[key] = value
            continue
        number, _, inside = rest.partition(".")
        if int(number) in new_number:
            state[f"{prefix}.{new_number[int(number)]}.{inside}"] = value
    student.load_state_dict(state, strict=True)
    student.tie_weights()
    return student


__all__ = ["check_layers", "with_layers"]
