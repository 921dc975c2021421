"""Where an answer ends, and what of it is text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: those that the model's generation settings name, and the tokenizer's own."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(int(token) for token in (*found, tokenizer.eos_token_id) if token is not None)


class StopStrings:
    """Texts of which each ends an answer."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        """Args: tokenizer: of the model; strings: none empty."""
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        # A token holds a byte at least, and a character has four at most.
        self._tail = 4 * max((len(one) for one in self.strings), default=0) + 4

    def __call__(self, ids: list[int]) -> bool:
        """Whether one of them stands at the end of what was written so far; only the last tokens are looked at."""
        text = self.tokenizer.decode(ids[-self._tail :], skip_special_tokens=True)
        return any(one in text for one in self.strings)

    def text(self, ids: Sequence[int]) -> str:
        """The answer's text up to the first of them, without special tokens."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        for one in self.strings:
            text = text.split(one, 1)[0]
        return text
