"""Where the attention and the feed-forward of each transformer block are, by the names that architectures give to their parts.

Every sublayer computes ``r + g(r)`` from the residual stream ``r``: pre-norm blocks (Llama, GPT-2, T5) as
``r + s, s = g(norm(r))``, post-norm blocks (BERT) as ``norm(r + s), s = g(r)``. A technique that changes ``s``, or reads
``r`` or ``r + s``, finds here the modules at which these pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost, pristine_modules
from lightning_ft.nn.select import block_lists, layer_index

Kind = Literal["attention", "cross_attention", "feed_forward"]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of one block; all names are pristine.

    Attributes:
        kind: what it computes.
        block: name of its block.
        number: number of the block over all stacks, the encoder's first.
        output: module whose output, or the first of its outputs, is ``s`` (B, T, D), after dropout.
        entry: module whose first argument is ``r`` (B, T, D).
        norm: module that maps ``r + s`` to the block's next state, in post-norm blocks; None in pre-norm ones.
        width: D.
        layout: name of the table's row that fits.
    """

    kind: Kind
    block: str
    number: int
    output: str
    entry: str
    norm: str | None
    width: int
    layout: str


@dataclass(frozen=True)
class _Layout:
    """What marks a block, what it must lack, and (kind, output, entry, norm) of its sublayers."""

    name: str
    needs: tuple[str, ...]
    lacks: tuple[str, ...]
    places: tuple[tuple[Kind, str, str, str | None], ...]
    norm_first: bool | None = None


# Blocks with these have norms behind the sublayers, or scale them before they are added.
_SANDWICH = (
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "residual_multiplier",
)
_TORCH = ("self_attn", "linear1", "linear2", "dropout1", "dropout2", "norm1", "norm2")

_LAYOUTS = (
    _Layout(
        "llama",
        ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        _SANDWICH,
        (
            ("attention", "self_attn", "input_layernorm", None),
            ("feed_forward", "mlp", "post_attention_layernorm", None),
        ),
    ),
    _Layout(
        "gpt2",
        ("attn.c_proj", "mlp.c_proj", "ln_1", "ln_2"),
        (),
        (("attention", "attn", "ln_1", None), ("feed_forward", "mlp", "ln_2", None)),
    ),
    _Layout(
        "bert",
        (
            "attention.self",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.LayerNorm",
        ),
        (),
        (
            ("attention", "attention.output.dropout", "attention.self", "attention.output.LayerNorm"),
            ("feed_forward", "output.dropout", "intermediate", "output.LayerNorm"),
        ),
    ),
    _Layout(
        "distilbert",
        ("attention.out_lin", "sa_layer_norm", "ffn.lin2", "output_layer_norm"),
        (),
        (("attention", "attention", "attention", "sa_layer_norm"), ("feed_forward", "ffn", "ffn", "output_layer_norm")),
    ),
    _Layout(
        "t5 decoder",
        ("layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense"),
        (),
        (
            ("attention", "layer.0.dropout", "layer.0.layer_norm", None),
            ("cross_attention", "layer.1.dropout", "layer.1.layer_norm", None),
            ("feed_forward", "layer.2.dropout", "layer.2.layer_norm", None),
        ),
    ),
    _Layout(
        "t5 encoder",
        ("layer.0.SelfAttention", "layer.1.DenseReluDense"),
        (),
        (
            ("attention", "layer.0.dropout", "layer.0.layer_norm", None),
            ("feed_forward", "layer.1.dropout", "layer.1.layer_norm", None),
        ),
    ),
    _Layout(
        "torch encoder, norm first",
        _TORCH,
        ("multihead_attn",),
        (("attention", "dropout1", "norm1", None), ("feed_forward", "dropout2", "norm2", None)),
        norm_first=True,
    ),
    _Layout(
        "torch encoder",
        _TORCH,
        ("multihead_attn",),
        (("attention", "dropout1", "self_attn", "norm1"), ("feed_forward", "dropout2", "linear1", "norm2")),
        norm_first=False,
    ),
)


def sublayers(model: nn.Module) -> list[Sublayer]:
    """Return the sublayers of a model whose blocks are of a known kind, in model order.

    Known are Llama and its relatives, GPT-2, BERT and its relatives, DistilBERT, T5, and torch's
    ``TransformerEncoderLayer``.

    Raises:
        Refusal: If there are none, or if only some blocks of a list are of a known kind.
    """
    places = {name: innermost(module) for name, (_, module) in pristine_modules(model).items()}
    found: list[Sublayer] = []
    blocks: list[str] = []
    for name, block in places.items():
        layout = _layout_of(name, block, places)
        if layout is None:
            continue
        for kind, output, entry, norm in layout.places:
            scale = cast(Tensor, places[f"{name}.{norm or entry}"].weight)
            found.append(
                Sublayer(
                    kind=kind,
                    block=name,
                    number=len(blocks),
                    output=f"{name}.{output}",
                    entry=f"{name}.{entry}",
                    norm=None if norm is None else f"{name}.{norm}",
                    width=scale.shape[-1],
                    layout=layout.name,
                )
            )
        blocks.append(name)
    sizes = block_lists(places)
    lists = {at[0] for name in blocks if (at := layer_index(name, sizes)) is not None}
    for prefix in lists:
        members = [name for name in places if name.rpartition(".")[0] == prefix]
        other = next((name for name in members if name not in blocks), None)
        if other is not None:
            raise Refusal(
                f"The block {other!r} is not built like the others of its list, so its sublayers are not known; name the "
                "modules that you mean by target."
            )
    if not found:
        raise Refusal(
            f"The sublayers of {type(model).__name__} are not known (known are blocks as in Llama, GPT-2, BERT, DistilBERT, "
            "T5 and torch's TransformerEncoderLayer); name the modules that you mean by target."
        )
    return found


def _layout_of(name: str, block: nn.Module, places: dict[str, nn.Module]) -> _Layout | None:
    """Return the first layout that a module fits."""
    for layout in _LAYOUTS:
        if not all(f"{name}.{part}" in places for part in layout.needs):
            continue
        if any(hasattr(block, part) for part in layout.lacks):
            continue
        if layout.norm_first in (None, getattr(block, "norm_first", None)):
            return layout
    return None


__all__ = ["Kind", "Sublayer", "sublayers"]
