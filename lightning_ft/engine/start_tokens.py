"""Which tokens a prefix or a prompt begins as: those of a text, or some of the vocabulary."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost


def text_ids(module: pl.LightningModule, technique: str, text: str) -> list[int]:
    """The tokens of a text, without those that a tokenizer puts around a whole row.

    Args:
        module: whose ``tokenizer`` it is.
        technique: name of the class, for messages.
        text: what to begin from.

    Raises:
        Refusal: a module without a tokenizer; a text without tokens.
    """
    tokenizer: Any = getattr(module, "tokenizer", None)
    if not callable(tokenizer):
        raise Refusal(f"{technique}.text needs a tokenizer, and {type(module).__name__} has none; leave the text out.")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise Refusal(f"{technique}.text {text!r} has no tokens; write what to begin from, or leave it out.")
    return ids


def vocabulary_ids(module: pl.LightningModule, embedding: nn.Module) -> list[int]:
    """The tokens that a random start may take.

    Special ones mark places in a row, and rows that pad a table were never trained: neither says anything to begin from.

    Args:
        module: whose ``tokenizer`` says which tokens there are, and which of them are special; without one all rows count.
        embedding: the table, or what is injected around it.
    """
    table: Any = innermost(embedding)
    tokenizer: Any = getattr(module, "tokenizer", None)
    rows: int = table.weight.shape[0]
    count = min(rows, len(tokenizer)) if hasattr(tokenizer, "__len__") else rows
    none = {*getattr(tokenizer, "all_special_ids", ()), getattr(table, "padding_idx", None)}
    return [i for i in range(count) if i not in none]
