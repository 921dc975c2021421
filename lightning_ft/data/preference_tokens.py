"""Prompts and their answers as token ids with spans, proven as SFT's rows are and tokenised once into the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.chat import Draft, draft
from lightning_ft.data.preference_rows import Exchange
from lightning_ft.data.sources import Source
from lightning_ft.data.spans import Rendered, SpecialTokens, render_drafts
from lightning_ft.data.tokenise import cached_rows
from lightning_ft.functional.errors import Refusal

_INT = datasets.Value("int32")
_COLUMNS = {
    "prompt": _INT,  # tokens of the prompt, with which `ids` begin
    "first": _INT,  # tokens of the answers behind it
    "second": _INT,
    "spans": datasets.Sequence(
        _INT
    ),  # start, end ... of the first answer, counted from its first token; then of the second
    "first_spans": _INT,  # how many of these numbers are the first answer's
    "first_scored": _INT,
    "second_scored": _INT,
    "same": datasets.Value("int8"),  # whether both answers have the same tokens
    "value": datasets.Value("float32"),  # margin or label
}

Read = Callable[[Mapping[str, Any]], Exchange]


@dataclass(frozen=True)
class RenderedExchange:
    """A tokenised prompt and its answers.

    Attributes:
        prompt: its token ids, at least one; those that every answer's rendering begins with.
        answers: ids of each, and [start, end) of what is learned, counted from the answer's first token.
        value: the margin or label.
    """

    prompt: list[int]
    answers: tuple[Rendered, ...]
    value: float


def render_exchanges(
    tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange | Refusal]
) -> list[RenderedExchange | Refusal]:
    """Tokenises exchanges together; each answer is rendered behind its prompt and proven to begin with it.

    Returns:
        For each what came of it, or the refusal that it deserves.
    """
    drafts: list[Draft | Refusal] = []
    for exchange in exchanges:
        if isinstance(exchange, Exchange):
            drafts += [_draft(tokenizer, exchange, which) for which in range(len(exchange.answers))]
    found = iter(render_drafts(tokenizer, drafts))
    special = SpecialTokens.of(tokenizer)
    results: list[RenderedExchange | Refusal] = []
    for exchange in exchanges:
        if isinstance(exchange, Refusal):
            results.append(exchange)
            continue
        try:
            results.append(_joined(exchange, [next(found) for _ in exchange.answers], special))
        except Refusal as refusal:
            results.append(refusal)
    return results


def _draft(tokenizer: PreTrainedTokenizerBase, exchange: Exchange, which: int) -> Draft | Refusal:
    answer, name = exchange.answers[which], exchange.names[which]
    if exchange.prompt is None:
        assert isinstance(answer, str)
        return Draft(text=answer, turns=None, plain=True)
    row = {"prompt": exchange.prompt, "completion": answer, "tools": exchange.tools}
    try:
        made = draft(tokenizer, row, "prompt_completion", "completion")
    except Refusal as refusal:
        return refusal
    turns = made.turns or ()
    return replace(made, turns=tuple(replace(t, name=name if made.plain else f"{name}: {t.name}") for t in turns))


def _joined(exchange: Exchange, rows: Sequence[Rendered | Refusal], special: SpecialTokens) -> RenderedExchange:
    """The rows of one exchange, cut behind their common prompt."""
    whole = []
    for row in rows:
        if isinstance(row, Refusal):
            raise row
        whole.append(row)
    if exchange.prompt is not None:
        prompt = whole[0].spans[0][0]
    else:
        prompt = _common(whole[0].ids, whole[1].ids)
        whole = [replace(row, spans=[(prompt, len(row.ids))]) for row in whole]
        for name, row in zip(exchange.names, whole, strict=True):
            if special.empty.issuperset(row.ids[prompt:]) and whole[0].ids != whole[1].ids:
                raise Refusal(f"{name} has nothing after what chosen and rejected both begin with, so it is no answer.")
    if prompt == 0:
        raise Refusal(
            "the prompt has no token, so nothing predicts an answer's first one: give a prompt."
            if exchange.prompt is not None
            else "chosen and rejected begin with different tokens, so there is no prompt: give the column prompt."
        )
    answers = [Rendered(row.ids[prompt:], [(a - prompt, b - prompt) for a, b in row.spans]) for row in whole]
    return RenderedExchange(whole[0].ids[:prompt], tuple(answers), exchange.value)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with; one less than all where both are the same."""
    shorter = min(len(first), len(second))
    differ = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), shorter)
    return min(differ, shorter - 1)


def tokenise_exchanges(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    read: Read,
    about: Mapping[str, Any],
    *,
    keep_bad_rows: bool,
    cache_dir: str | Path | None,
) -> Dataset:
    """Tokenises prompts with one or two answers, or finds them tokenised.

    Args:
        source: the rows.
        tokenizer: any.
        read: what a row says, or a `Refusal`.
        about: all that decides what ``read`` makes of a row, as JSON.
        keep_bad_rows: put the reason into the column ``problem`` instead of raising at the first unfit row.
        cache_dir: folder of the cache.

    Returns:
        One row for each of the source: ``ids`` of prompt and answers one after the other, and the columns above.

    Raises:
        Refusal: the first unfit row with its place, or no room on the disk.
    """

    def made(rows: list[dict[str, Any]]) -> list[Mapping[str, Any] | Refusal]:
        exchanges: list[Exchange | Refusal] = []
        for row in rows:
            try:
                exchanges.append(read(row))
            except Refusal as refusal:
                exchanges.append(refusal)
            except RecursionError:
                exchanges.append(Refusal("the row is nested too deeply: lists and objects within one another."))
        found = render_exchanges(tokenizer, exchanges)
        return [one if isinstance(one, Refusal) else _columns(one) for one in found]

    return cached_rows(source, tokenizer, made, _COLUMNS, about, keep_bad_rows=keep_bad_rows, cache_dir=cache_dir)


def _columns(exchange: RenderedExchange) -> dict[str, Any]:
    first, *others = exchange.answers
    second = others[0] if others else Rendered([], [])
    spans = [[edge for span in one.spans for edge in span] for one in (first, second)]
    ids = [*exchange.prompt, *first.ids, *second.ids]
    return {
        "ids": ids,
        "length": len(ids),
        "prompt": len(exchange.prompt),
        "first": len(first.ids),
        "second": len(second.ids),
        "spans": spans[0] + spans[1],
        "first_spans": len(spans[0]),
        "first_scored": _scored(first),
        "second_scored": _scored(second),
        "same": int(first.ids == second.ids),
        "value": exchange.value,
    }


def _scored(answer: Rendered) -> int:
    """Every token of a span: behind a prompt the first has something that predicts it."""
    return sum(end - start for start, end in answer.spans)
