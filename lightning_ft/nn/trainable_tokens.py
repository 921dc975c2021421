"""Single rows of an embedding (and of the head tied to it) that learn while the rest of the table stays frozen.

A new meaning for a few tokens (a chat format's markers, a control word) needs a few vectors of the table, not all 50,000
to 250,000 of them. A layer here computes with the frozen table in which these rows are replaced by trained ones: an
embedding looks them up, a head scores them. Of modules that share their weight each gets a layer, and these share their
rows. PEFT calls this ``trainable_token_indices``; its file format is in `lightning_ft.formats.peft`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora_layers import output_scale
from lightning_ft.nn.packed import is_packed
from lightning_ft.nn.registry import (
    InjectedLayer,
    innermost,
    pristine_modules,
    replace_module,
    shared_parameters,
)
from lightning_ft.nn.select import is_called_by_weight, matches, select

Tokens = Sequence[int] | Mapping[str, Sequence[int]]
"""Token ids of the input embedding, or for each name of a table (an embedding or a head) its ids."""


class TokenRows(InjectedLayer, ABC):
    """What the two kinds share: the trained rows, fp32, which start as the table has them.

    Args:
        base: The embedding or head to wrap; its weight is (V, D).
        tokens: Ids of the rows, ascending, each once.
        rows: (len(tokens), D): the rows of a layer whose base has the same weight; None makes new ones.
        adapter_name: Adapter that the layer belongs to.
        name: Pristine name of the wrapped module, for messages.
    """

    kind = "token_rows"
    changes_weight = True
    decays = False
    token_rows: nn.Parameter
    token_ids: Tensor

    def __init__(
        self,
        base: nn.Module,
        tokens: Sequence[int],
        *,
        rows: nn.Parameter | None = None,
        adapter_name: str = "default",
        name: str = "",
    ) -> None:
        super().__init__(base, adapter_name)
        self.tokens, self.name = tuple(tokens), name
        weight = cast(Tensor, innermost(base).weight)
        self.register_buffer("token_ids", torch.empty(len(tokens), dtype=torch.int64, device=weight.device), False)
        if rows is None:
            # At least fp32; a wider table keeps its width, so that the first forward is the base's own.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            rows = nn.Parameter(torch.empty(len(tokens), weight.shape[1], dtype=dtype, device=weight.device))
            self.token_rows = rows
            self.reset_parameters()
        else:
            self.token_rows = rows
            self._set_ids()
        self.training = base.training

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the rows to those of the table."""
        self._set_ids()
        if self.token_rows.is_meta:
            return
        self.token_rows.copy_(cast(Tensor, innermost(self).weight)[self.token_ids])
        self.starts_as_identity = True

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return the table with the trained rows in their places."""
        return weight.index_copy(0, self.token_ids, self.token_rows.to(weight.dtype))

    def extra_repr(self) -> str:
        """Show what distinguishes this layer."""
        return f"adapter={self.adapter_name!r}, tokens={len(self.tokens)}"

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Compute as the base does with the trained rows in its table."""

    def _set_ids(self) -> None:
        if not self.token_ids.is_meta:
            self.token_ids.copy_(torch.tensor(self.tokens, device="cpu"))


class EmbeddingRows(TokenRows):
    """Trained rows of an embedding: ids (...) to (..., D). A row that the base pads with learns too, once asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings of the ids ``x``, those of the trained tokens from the trained rows."""
        out = self.base(x)  # (..., D)
        if not self.enabled:
            return out
        ids = x.to(self.token_ids.dtype)
        places = torch.searchsorted(self.token_ids, ids).clamp(max=len(self.tokens) - 1)
        # Looked up in fp32 and then cast, so that the gradient of a token that occurs often is summed in fp32.
        rows = F.embedding(places, self.token_rows).to(out.dtype)
        scale = output_scale(innermost(self), out)
        rows = rows if scale is None else rows * scale
        return torch.where((self.token_ids[places] == ids).unsqueeze(-1), rows, out)


class HeadRows(TokenRows):
    """Trained rows of an output head: hidden states (..., D) to logits (..., V)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's logits, those of the trained tokens changed by what their rows have learned."""
        out = self.base(x)  # (..., V)
        if not self.enabled:
            return out
        # What was learned is added, so that at the start nothing is, to the bit, and so that backward copies no logits.
        learned = self.token_rows - cast(Tensor, self.base.weight)[self.token_ids].to(self.token_rows.dtype)
        change = F.linear(x, learned.to(x.dtype)).to(out.dtype)
        # A second tensor of V logits a token is dear, and no backward of a linear layer needs its output; but a changed
        # view would be a view to autograd, which FSDP2 warns of where a unit returns one.
        add = out.index_add if out._is_view() else out.index_add_
        return add(-1, self.token_ids, change)


def rows_by_table(model: nn.Module, tokens: Tokens) -> dict[str, tuple[int, ...]]:
    """Return what `inject_token_rows` would wrap: the pristine name of each table, tied ones included, with its ids.

    Of tables that are tied, an embedding comes first.

    Raises:
        Refusal: As for `inject_token_rows`.
    """
    standing = {name: module for name, (_, module) in pristine_modules(model).items() if name}
    places = {name: innermost(module) for name, module in standing.items()}
    asked = _asked(model, places, tokens)
    tied = {id(p): [n.removesuffix(".weight") for n in names] for p, names in shared_parameters(model).items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in asked.items():
        group = tied.get(id(getattr(places[name], "weight", None)), [name])
        embeddings = [member for member in group if isinstance(places.get(member), nn.Embedding)]
        if embeddings and not any(member in asked for member in embeddings):
            raise Refusal(
                f"trainable_tokens cannot train rows of {name!r} alone: its weight is tied to {embeddings[0]!r}; name that "
                "one, and both change."
            )
        for member in sorted(group, key=lambda n: n not in embeddings):
            if found.setdefault(member, ids) != ids:
                raise Refusal(
                    f"trainable_tokens gives {member!r} and {name!r} different ids, but they share one weight; give them "
                    "the same ids."
                )
    for name, ids in found.items():
        _check_table(name, places[name], ids)
        outer = standing[name]
        if isinstance(outer, InjectedLayer):
            raise Refusal(
                f"trainable_tokens cannot train rows of {name!r}: it already carries the adapter {outer.adapter_name!r}, whose "
                "effect on these rows would be lost; train rows before that one is injected, or leave them out."
            )
    return found


def inject_token_rows(model: nn.Module, tokens: Tokens, *, adapter_name: str = "default") -> dict[str, TokenRows]:
    """Wrap an embedding and what is tied to it, in place, so that single rows can train; return the layers by name.

    Nothing is frozen here. The first forward equals the one before.

    Args:
        model: Any module; for a list of ids, one with an input embedding that can be told.
        tokens: Ids of the input embedding, or ids for each name of an embedding or of a head that is not tied.
        adapter_name: Name of the adapter that the layers belong to.

    Raises:
        Refusal: For ids outside the table, and for tables that cannot be wrapped. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> inject_token_rows(net, [7, 3])["0"].token_rows.shape
        torch.Size([2, 4])
    """
    tables = rows_by_table(model, tokens)
    places = pristine_modules(model)
    made: dict[int, nn.Parameter] = {}
    layers: dict[str, TokenRows] = {}
    for name, ids in tables.items():
        path, module = places[name]
        kind = EmbeddingRows if isinstance(module, nn.Embedding) else HeadRows
        weight = id(module.weight)
        layers[name] = kind(module, ids, rows=made.get(weight), adapter_name=adapter_name, name=name)
        made.setdefault(weight, layers[name].token_rows)
        replace_module(model, path, layers[name])
    return layers


def input_embedding(model: nn.Module) -> str | None:
    """Return the pristine name of the table that turns a model's token ids into vectors; None if it cannot be told.

    A Hugging Face model says which; elsewhere it is the one called ``embed_tokens``, or the only embedding.
    """
    places = {name: innermost(module) for name, (_, module) in pristine_modules(model).items() if name}
    embeddings = {name: module for name, module in places.items() if isinstance(module, nn.Embedding)}
    get = getattr(model, "get_input_embeddings", None)
    if callable(get):
        told = innermost(get())
        return next((name for name, module in embeddings.items() if module is told), None)
    called_so = [name for name in embeddings if matches(name, "embed_tokens")]
    candidates = called_so or list(embeddings)
    return candidates[0] if len(candidates) == 1 else None


def ascending(ids: Sequence[int], where: str) -> tuple[int, ...]:
    """Return token ids in ascending order.

    Args:
        ids: Ids in any order.
        where: The argument that they come from, for messages.

    Raises:
        Refusal: If one is no whole number from 0 on or occurs twice, or if there is none.
    """
    for token, count in Counter(ids).items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise Refusal(f"{where} must be token ids, whole numbers from 0 on, got {token!r}.")
        if count > 1:
            raise Refusal(f"{where} must name each token once, got {token} {count} times.")
    if not ids:
        raise Refusal(f"{where} must name at least one token, got {ids!r}.")
    return tuple(sorted(ids))


def _asked(model: nn.Module, places: Mapping[str, nn.Module], tokens: Tokens) -> dict[str, tuple[int, ...]]:
    """Return ids, ascending, by the name of each table that is meant, without those tied to it."""
    if not isinstance(tokens, Mapping):
        name = input_embedding(model)
        if name is None:
            some = [n for n, module in places.items() if isinstance(module, nn.Embedding)]
            raise Refusal(
                f"trainable_tokens cannot tell which table is meant: the model has {len(some)} embeddings "
                f"({', '.join(some[:4]) or 'none'}); name one: {{'embed': [ids]}}."
            )
        return {name: ascending(tokens, "trainable_tokens")}
    asked: dict[str, tuple[int, ...]] = {}
    for pattern, given in tokens.items():
        ids = ascending(given, f"trainable_tokens[{pattern!r}]")
        for name in select(places, pattern):
            if asked.setdefault(name, ids) != ids:
                raise Refusal(f"trainable_tokens names {name!r} twice, with different ids; name it once.")
    return asked


def _check_table(name: str, table: nn.Module, ids: tuple[int, ...]) -> None:
    """Refuse ids that a table does not hold, and tables that cannot be wrapped."""
    if not isinstance(table, nn.Embedding | nn.Linear):
        raise Refusal(
            f"trainable_tokens cannot train rows of {name!r}, a {type(table).__name__}: name an embedding or an output head."
        )
    weight = cast(Tensor, table.weight)
    if is_packed(weight):
        raise Refusal(f"trainable_tokens cannot train rows of {name!r}: its weight is packed ({weight.dtype}).")
    if getattr(table, "max_norm", None) is not None:
        raise Refusal(
            f"trainable_tokens cannot train rows of {name!r}: its max_norm rewrites the frozen table in place."
        )
    if is_called_by_weight(table):
        raise Refusal(f"trainable_tokens cannot train rows of {name!r}: its weight is read without calling it.")
    if ids[-1] >= weight.shape[0]:
        raise Refusal(
            f"trainable_tokens: {name!r} has {weight.shape[0]:,} tokens, 0 to {weight.shape[0] - 1}, and no token {ids[-1]}."
        )


__all__ = [
    "EmbeddingRows",
    "HeadRows",
    "TokenRows",
    "Tokens",
    "ascending",
    "inject_token_rows",
    "input_embedding",
    "rows_by_table",
]
