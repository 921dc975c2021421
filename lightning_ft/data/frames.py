"""What a tokenizer puts around one text or a pair of them: [CLS] ... [SEP] ... [SEP], a BOS, or nothing.

Texts are tokenised alone and framed when they are dealt, so that a row that is cut keeps its special tokens, and of a
pair the longer text gives way first, as tokenizers do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.prefixes import plain_ids
from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Frame:
    """The special tokens of a row, with the types (``token_type_ids``) of all its tokens.

    Attributes:
        before: tokens before the first text.
        between: tokens between the two; of single texts none.
        after: tokens after the last.
        pair: whether there is a second text.
        types: of the tokens before, of the first text, between, of the second text, after; None where a row has none, or
            only zeros.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    pair: bool
    types: tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]] | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> Frame:
        """Read off what the tokenizer makes of a probe.

        Raises:
            Refusal: the probe does not stand in its row as it stands alone.
        """
        probe = ("a", "b") if pair else ("a",)
        alone = plain_ids(tokenizer, probe)
        encoded = tokenizer(*probe)
        row = list(encoded["input_ids"])
        first, second = alone["a"], alone.get("b", [])
        start = _find(row, first, 0)
        middle = _find(row, second, start + len(first)) if pair else start + len(first)
        end = middle + len(second)
        if start < 0 or middle < 0:
            raise Refusal(
                f"The tokenizer {type(tokenizer).__name__} makes other tokens of a text inside a row than of the text alone, so "
                "its special tokens cannot be told from it; use another tokenizer."
            )
        types = list(encoded.get("token_type_ids") or [])
        kinds = None
        if any(types):
            inner = start + len(first)
            kinds = (
                tuple(types[:start]),
                types[start],
                tuple(types[inner:middle]),
                types[middle] if pair else 0,
                tuple(types[end:]),
            )
        return cls(tuple(row[:start]), tuple(row[start + len(first) : middle]), tuple(row[end:]), pair, kinds)

    @property
    def size(self) -> int:
        """How many special tokens a row has."""
        return len(self.before) + len(self.between) + len(self.after)

    def ids(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """(T,) token ids of a row, int64."""
        return np.concatenate([self.before, first, self.between, second, self.after]).astype(np.int64)

    def types_of(self, first: int, second: int) -> np.ndarray | None:
        """(T,) types of a row whose texts have so many tokens, int64; None where rows have none."""
        if self.types is None:
            return None
        before, one, between, two, after = self.types
        return np.array([*before, *[one] * first, *between, *[two] * second, *after], dtype=np.int64)


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens each of two texts keeps of ``room``: the longer one gives way, as fast tokenizers do it."""
    if first + second <= room:
        return first, second
    if first > second:
        second, first = shares(second, first, room)
        return first, second
    kept = min(first, room // 2)
    return kept, room - kept


def _find(row: Sequence[int], part: Sequence[int], begin: int) -> int:
    """Where ``part`` stands in ``row`` from ``begin`` on, or -1."""
    places = range(max(begin, 0), len(row) - len(part) + 1)
    return next((place for place in places if list(row[place : place + len(part)]) == list(part)), -1)
