"""Token ids of texts and of their prefixes, without tokenising a shared beginning twice.

Fast tokenizers cut a text at its added tokens before anything else, and what follows one is tokenised by itself. So
with ``S`` the last added token in a prefix ``a + S + b`` of a text, the prefix has the text's own ids up to ``S``, and
then those of ``b``, for which the few characters ``S + b`` are tokenised, once for all rows. Where that cannot be shown
(a tokenizer written in Python, an added token that eats spaces, an ``S`` that is not found in the ids) the whole prefix
is tokenised. Conversations of several turns take a time proportional to their length, not to its square.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Anchors:
    """Added tokens that are cut out of any text wherever they stand: their ids, and a pattern that finds them."""

    ids: dict[str, int]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Anchors | None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            return None
        added = tokenizer.added_tokens_decoder.items()
        if any(token.lstrip or token.rstrip or token.single_word or token.normalized for _, token in added):
            return None
        ids = {token.content: number for number, token in added if token.content}
        longest_first = sorted(ids, key=len, reverse=True)
        return cls(ids, re.compile("|".join(map(re.escape, longest_first)))) if ids else None


def tokenise_prefixes(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, list[int]]]:
    """Ids, without special tokens put around, of texts and of prefixes of them.

    Args:
        tokenizer: any.
        texts: each text with the prefixes of it that are wanted; one that is no prefix is tokenised like any text.

    Returns:
        For each text the ids of itself and of its prefixes, each equal to what the tokenizer gives for it alone.
    """
    whole = plain_ids(tokenizer, texts)
    anchors = _Anchors.of(tokenizer)
    parts: dict[str, dict[str, tuple[list[int], str]]] = {}  # text -> prefix -> (ids before the anchor, anchor + rest)
    for text, prefixes in texts.items():
        parts[text] = _split(text, whole[text], [p for p in prefixes if p != text], anchors)
    rests = plain_ids(tokenizer, {rest for split in parts.values() for _, rest in split.values()})
    return {
        text: {text: whole[text], **{prefix: head + rests[rest] for prefix, (head, rest) in split.items()}}
        for text, split in parts.items()
    }


def _split(
    text: str, ids: Sequence[int], prefixes: Sequence[str], anchors: _Anchors | None
) -> dict[str, tuple[list[int], str]]:
    """For each prefix the ids that it shares with the text, and what is left of it to tokenise."""
    alone: dict[str, tuple[list[int], str]] = {prefix: ([], prefix) for prefix in prefixes}
    if anchors is None or not prefixes:
        return alone
    found = [(match.start(), match.end(), anchors.ids[match.group()]) for match in anchors.pattern.finditer(text)]
    known = set(anchors.ids.values())
    places = [place for place, number in enumerate(ids) if number in known]
    if [number for _, _, number in found] != [ids[place] for place in places]:
        return alone  # the text holds what reads like an added token and was not taken for one, or the reverse
    split: dict[str, tuple[list[int], str]] = {}
    for prefix in prefixes:
        inside = [i for i, (start, _, _) in enumerate(found) if start < len(prefix)]
        if not text.startswith(prefix) or not inside or found[inside[-1]][1] > len(prefix):
            split[prefix] = alone[prefix]
            continue
        last = inside[-1]
        split[prefix] = (list(ids[: places[last]]), prefix[found[last][0] :])
    return split


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of texts without special tokens around them, each distinct text once."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    found = tokenizer(unique, add_special_tokens=False, **options)["input_ids"]
    return dict(zip(unique, found, strict=True))
