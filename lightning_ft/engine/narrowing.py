"""A student with narrower feed-forwards: in each block the neurons whose weights are largest stay (magnitude pruning)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.select import block_lists, is_conv1d, layer_index, linear_names

_WIDTHS = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim")
"""What configurations call the number of neurons."""


@torch.no_grad()
def narrow_(model: Any, neurons: int) -> None:
    """Keeps so many neurons of each feed-forward, in their order; everything else of the model stays.

    A neuron is what one column of the layer that ends a feed-forward reads; it counts as much as the product of that column's
    norm and those of the rows that make it (two where the feed-forward is gated). The model then computes what it would with the
    other neurons at zero: it has to learn again, and distillation is how.

    Args:
        model: a transformers model with its weights, not packed; changed in place, its configuration too.
        neurons: fewer than it has.

    Raises:
        Refusal: the feed-forwards cannot be told (experts that are no layers), or have no more neurons than that.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    names = [name for name in _WIDTHS if hasattr(config, name)]
    # GPT-2's is None, which means four times the hidden states.
    widths = {getattr(config, name) or 4 * int(config.hidden_size) for name in names}
    if len(widths) != 1:
        found = ", ".join(map(str, sorted(widths))) or "none in its configuration"
        raise Refusal(
            f"--neurons takes a model whose feed-forwards have one width, and {type(model).__name__} has {found}; take fewer "
            "blocks instead (--keep)."
        )
    width = widths.pop()
    if not 1 <= neurons < width:
        raise Refusal(
            f"--neurons must be from 1 to {width - 1}, one less than {type(model).__name__} has, got {neurons}."
        )
    for begins, end in _feed_forwards(model, width):
        weight = torch.ones((), dtype=torch.float32)
        for layer in (*begins, end):
            rows = _rows(layer, ends=layer is end).float()
            parts = rows.reshape(
                -1, width, rows.shape[-1]
            )  # two of a fused layer, gates and values one after the other
            weight = weight * parts.norm(dim=-1).prod(0)
        kept = weight.topk(neurons).indices.sort().values
        for layer in begins:
            halves = _rows(layer, ends=False).shape[0] // width
            _keep_(layer, torch.cat([kept + width * half for half in range(halves)]), ends=False)
        _keep_(end, kept, ends=True)
    for name in names:
        setattr(config, name, neurons)


def _feed_forwards(model: Any, width: int) -> list[tuple[list[nn.Module], nn.Module]]:
    """(the layers that make the neurons, the layer that reads them) of each feed-forward."""
    linear = [name for name in linear_names(model) if "att" not in name.lower()]
    sizes, places = block_lists(linear), dict(model.named_modules())
    blocks: dict[Any, list[str]] = defaultdict(list)
    for name in linear:
        if (block := layer_index(name, sizes)) is not None:
            blocks[block].append(name)
    found = []
    for names in blocks.values():
        shapes = {name: _rows(places[name], ends=False).shape for name in names}  # (outputs, inputs)
        ends = [name for name in names if shapes[name][1] == width and shapes[name][0] != width]
        begins = [name for name in names if shapes[name][0] in (width, 2 * width) and shapes[name][1] != width]
        if len(ends) != 1 or not begins:
            raise Refusal(
                f"{type(model).__name__} has blocks in which no one layer reads the {width} neurons that others make (experts, "
                "say), so that they cannot be told; take fewer blocks instead (--keep)."
            )
        found.append(([places[name] for name in begins], places[ends[0]]))
    if not found:
        raise Refusal(f"{type(model).__name__} has no feed-forwards in blocks; take fewer blocks instead (--keep).")
    return found


def _rows(layer: Any, *, ends: bool) -> Tensor:
    """Its weight with what it makes in rows, or (``ends``) with what it reads in rows."""
    weight: Tensor = layer.weight
    return weight if is_conv1d(layer) == ends else weight.T


def _keep_(layer: Any, kept: Tensor, *, ends: bool) -> None:
    axis = 0 if is_conv1d(layer) == ends else 1
    layer.weight = nn.Parameter(layer.weight.index_select(axis, kept), requires_grad=layer.weight.requires_grad)
    if not ends and getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(layer.bias[kept], requires_grad=layer.bias.requires_grad)
    if is_conv1d(layer):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


__all__ = ["narrow_"]
