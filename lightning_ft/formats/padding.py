"""A padding token that no row ends with, for decoders that classify.

Transformers reads a decoder's row at its rightmost token that is not the padding token, found by comparing ids. Where that is
the token that rows end with (pad = eos, the habit of models without one), it reads the token before, and without one it takes
no batches at all.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning_ft.formats.heads import kind_of

NAME = "<|pad|>"


def padding_of(model: Any, tokenizer: Any) -> int | None:
    """The id to pad rows of a decoder with, so that transformers reads them where they end.

    Args:
        model: a transformers model that classifies rows.
        tokenizer: its tokenizer.

    Returns:
        The configured one where rows never end with it, else another special token; None: the vocabulary has none to spare.
    """
    ends = _ends(model, tokenizer)
    special = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    named = [number for token, number in sorted(special.items()) if "pad" in token.lower()]
    given = [model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, *named]
    spare = [tokenizer.bos_token_id, tokenizer.unk_token_id, *sorted(tokenizer.all_special_ids)]
    rows = model.get_input_embeddings().weight.shape[0]
    return next((one for one in (*given, *spare) if one is not None and one not in ends and 0 <= one < rows), None)


def give_padding_(model: Any, tokenizer: Any) -> Any:
    """Let a decoder's copy, and a copy of its tokenizer, pad with a token of which `padding_of` speaks, or a new one.

    Args:
        model: a copy that the caller made; edited in place. A new token adds a row to its embedding where that has none left.
        tokenizer: is not changed.

    Returns:
        The tokenizer to write beside it.
    """
    if kind_of(model.config) != "decoder":
        return tokenizer
    tokenizer, pad = copy.deepcopy(tokenizer), padding_of(model, tokenizer)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": NAME})
        pad = tokenizer.pad_token_id
        if pad >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(pad + 1, mean_resizing=False)
    elif tokenizer.pad_token_id != pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.get_text_config().pad_token_id = pad
    tokenizer.padding_side = "right"  # positions that a model counts from the left edge are right then
    return tokenizer


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Ids that a row may end with by design: the end of the text, and what an assistant turn ends with."""
    config = model.config.get_text_config()
    ends: set[int] = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    for one in (config.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)):
        ends.update(one if isinstance(one, (list, tuple)) else [one] if one is not None else [])
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        tail = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        ends |= set(tail[-2:])
    return ends
