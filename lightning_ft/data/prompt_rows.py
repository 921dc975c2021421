"""What a row of prompts is, and its token ids: a text to go on with, or a conversation to answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.chat import render_text, require_template
from lightning_ft.data.rows import messages_in, text_in, tools_in, type_in_words, whole_text
from lightning_ft.data.sources import Source
from lightning_ft.data.token_rows import BadRows, Sieve, TokenRows
from lightning_ft.data.tokenise import cached_rows
from lightning_ft.functional.errors import Refusal

Cut = Literal["error", "drop", "keep_end"]
_OWN = ("prompt", "tools")
_COLUMNS = {"spans": datasets.Sequence(datasets.Value("int32")), "scored": datasets.Value("int32")}


@dataclass(frozen=True)
class Asking:
    """How prompts are put to the model.

    Attributes:
        chat: whether a text is sent as a user's message.
        system: what the system says first; None: nothing but what the template itself says.
    """

    chat: bool
    system: str | None

    def prompt(self, row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        """What the model is asked.

        Raises:
            Refusal: what is wrong with the row, without saying where it stands.
        """
        column = column_of(row)
        given = row.get(column)
        if isinstance(given, list):
            messages = messages_in(given, column)
            if messages[-1]["role"] == "assistant":
                raise Refusal(
                    f"{column} ends with an assistant turn, so that nothing is left to answer: take it out, or run SFT."
                )
        elif isinstance(given, str):
            text = text_in(row, column)
            if not self.chat:
                return text
            messages = [{"role": "user", "content": text}]
        else:
            raise Refusal(f"{column} must be a string or a list of messages, found {type_in_words(given)}.")
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def ids(self, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
        """What the model reads."""
        asked = self.prompt(row)
        if isinstance(asked, str):
            ids = tokenizer(asked)["input_ids"]
        else:
            require_template(tokenizer)
            text = render_text(tokenizer, asked, tools_in(row.get("tools")), add_generation_prompt=True)
            ids = tokenizer(whole_text(text, "the rendered prompt"), add_special_tokens=False)["input_ids"]
        assert isinstance(ids, list)
        if not ids:
            raise Refusal("the prompt has no token, so nothing predicts an answer's first one: give a prompt.")
        return ids


def column_of(columns: Iterable[str]) -> str:
    """The column that asks: ``prompt``, else ``question``, as reasoning-gym calls it."""
    return "prompt" if "prompt" in columns or "question" not in columns else "question"


def other_columns(columns: Iterable[str]) -> list[str]:
    """Those that rewards may ask for."""
    return [name for name in columns if name not in _OWN]


def check_columns(source: Source) -> None:
    """Refuses a source without prompts.

    Raises:
        Refusal: with the columns that there are.
    """
    if column_of(source.columns) not in source.columns:
        near = difflib.get_close_matches("prompt", source.columns, n=1, cutoff=0.6)
        hint = f"; is {near[0]!r} meant to be 'prompt'?" if near else "."
        raise Refusal(
            f"{source.where(0)}: found the columns {', '.join(source.columns) or 'none'}, expected prompt{hint}"
        )


def tokenise_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    asking: Asking,
    *,
    keep_bad_rows: bool,
    cache_dir: str | Path | None,
) -> Dataset:
    """Tokenises prompts, or finds them tokenised; see `lightning_ft.data.tokenise.cached_rows`."""

    def made(rows: list[dict[str, Any]]) -> list[Mapping[str, Any] | Refusal]:
        found: list[Mapping[str, Any] | Refusal] = []
        for row in rows:
            try:
                ids = asking.ids(tokenizer, row)
                found.append({"ids": ids, "length": len(ids), "spans": [], "scored": 0})
            except Refusal as refusal:
                found.append(refusal)
        return found

    about = {"kind": "prompts", "chat": asking.chat, "system": asking.system}
    return cached_rows(source, tokenizer, made, _COLUMNS, about, keep_bad_rows=keep_bad_rows, cache_dir=cache_dir)


def select_prompts(
    table: Dataset, source: Source, *, max_length: int | None, truncation: Cut, bad_rows: BadRows, bos: int | None
) -> TokenRows:
    """Which prompts are used and where they are cut: a long one loses its beginning, but for BOS."""
    whole = table.data.column("length").to_numpy().astype(np.int64)
    sieve = Sieve(source, len(whole), bad_rows)
    sieve.take_out(whole == 0, "unfit", lambda row, _: str(table[row]["problem"]))
    lengths = sieve.within(whole, max_length, truncation)
    rows = TokenRows(table, np.arange(len(whole)), lengths, np.zeros_like(whole), True, bos, sieve.report())
    return rows.subset(sieve.left())
