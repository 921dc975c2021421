"""Tokens of a row and the spans to be learned, found by tokenising its prefixes and proven for every row.

For an assistant turn k, with ``render`` the tokenizer's own template:

    render(messages[:k], add_generation_prompt=True)
    is a prefix of render(messages[:k+1]), which is a prefix of render(messages),

in characters and in tokens. The span begins where the first ends, and ends after the token that closes the turn, before
whatever white space the template writes behind it. So what is learned is what the model will be asked to write, and ids
are never compared with a pad or EOS token to find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.chat import Draft, LossOn, Turn, draft
from lightning_ft.data.prefixes import tokenise_prefixes
from lightning_ft.data.rows import Kind, kind_of, normalise, wrong_columns
from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Rendered:
    """A tokenised row.

    Attributes:
        ids: (T,) token ids.
        spans: [start, end) of the tokens to learn, ascending and disjoint.
    """

    ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def scored(self) -> int:
        """Tokens that a loss counts: those in a span, without position 0, which nothing predicts."""
        return sum(end - max(start, 1) for start, end in self.spans if end > max(start, 1))


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer puts around and between texts.

    Attributes:
        bos: the token it puts before a text of its own accord, or None.
        any_bos: its BOS whether it puts it or not (a template may).
        eos: or None.
        closers: ids that can close a turn: EOS and every added token but BOS and the unknown token.
        empty: ids that say nothing: BOS, EOS, padding and the unknown token.
    """

    bos: int | None
    any_bos: int | None
    eos: int | None
    closers: frozenset[int]
    empty: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Reads them off a tokenizer."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:  # BERT's begins a text with [CLS] and ends it with [SEP]
            bos, eos = tokenizer.cls_token_id, tokenizer.sep_token_id
        puts_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
        closers = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        closers -= {bos, tokenizer.unk_token_id}
        closers |= {eos} if eos is not None else set()
        empty = {bos, eos, tokenizer.pad_token_id, tokenizer.unk_token_id} - {None}
        return cls(bos if puts_bos else None, bos, eos, frozenset(closers), frozenset(empty))


def render(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], loss_on: LossOn = "auto") -> Rendered:
    """Tokenises one row.

    Args:
        tokenizer: any; its template is used unpatched.
        row: ``messages``, ``prompt`` and ``completion``, or ``text``.
        loss_on: what is learned: ``assistant`` turns, only the ``last_assistant`` turn, the ``completion``, ``all``
            tokens; ``auto`` is the first, third or fourth of them by the row's columns.

    Raises:
        Refusal: whatever makes the row unfit; the sentence does not say where the row stands.
    """
    kind = kind_of(row)
    if kind is None:
        raise wrong_columns("The row", row)
    (result,) = render_rows(tokenizer, [row], kind, loss_on)
    if isinstance(result, Refusal):
        raise result
    return result


def render_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], kind: Kind, loss_on: LossOn = "auto"
) -> list[Rendered | Refusal]:
    """Tokenises rows together: all texts and all their prefixes in one call, each distinct one once.

    Returns:
        For each row what came of it, or the refusal that it deserves (returned, since one row must not hide another).
    """
    drafts: list[Draft | Refusal] = []
    for row in rows:
        try:
            drafts.append(draft(tokenizer, normalise(row, kind), kind, loss_on))
        except Refusal as refusal:
            drafts.append(refusal)
    return render_drafts(tokenizer, drafts)


def render_drafts(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft | Refusal]) -> list[Rendered | Refusal]:
    """Tokenises drafts together, see `render_rows`; one that was refused stays so."""
    ids = _tokenise(tokenizer, [d for d in drafts if isinstance(d, Draft)])
    special = SpecialTokens.of(tokenizer)
    results: list[Rendered | Refusal] = []
    for item in drafts:
        try:
            if isinstance(item, Refusal):
                raise item
            results.append(_rendered(tokenizer, item, ids[item.text], special))
        except Refusal as refusal:
            results.append(refusal)
    return results


def _tokenise(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft]) -> dict[str, dict[str, list[int]]]:
    """Row text -> ids of it and of every prefix of it that the proofs need."""
    texts: dict[str, dict[str, None]] = {}
    for item in drafts:
        needed = texts.setdefault(item.text, {})
        for turn in item.turns or ():
            needed[turn.prompt] = None
            if turn.until is not None:
                needed[turn.until] = None
    return tokenise_prefixes(tokenizer, texts)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, item: Draft, ids: Mapping[str, list[int]], special: SpecialTokens
) -> Rendered:
    before: list[int] = []
    after: list[int] = []
    full = ids[item.text]
    if item.plain:
        if special.eos is None:
            raise Refusal("the tokenizer has no EOS token to end the row with: set its eos_token.")
        before = [special.bos] if special.bos is not None else []
        after = [] if full[-1:] == [special.eos] else [special.eos]
    row = [*before, *full, *after]
    if special.any_bos is not None and row[:2] == [special.any_bos] * 2:
        raise Refusal(
            f"the row begins with two BOS tokens ({_decode(tokenizer, [special.any_bos])!r}): take the one written in "
            "the row or the template away."
        )
    if item.turns is None:
        spans = [(0, len(row))]
    else:
        spans = []
        for turn in item.turns:
            start, end = _span(tokenizer, turn, item.text, ids, special)
            closing: set[int] = set() if turn.until is None else {full[end - 1]}
            if special.empty.union(closing).issuperset(full[start:end]):
                raise Refusal(f"{turn.name} has no text but special tokens, so there is nothing to learn from it.")
            spans.append((start + len(before), len(row) if turn.until is None else end + len(before)))
    result = Rendered(ids=row, spans=spans)
    if result.scored == 0:
        raise Refusal("no token of the row is learned.")
    return result


def _span(
    tokenizer: PreTrainedTokenizerBase, turn: Turn, text: str, ids: Mapping[str, list[int]], special: SpecialTokens
) -> tuple[int, int]:
    """[start, end) of a turn among the tokens of the row's text."""
    full, prompt = ids[text], ids[turn.prompt]
    until_text = text if turn.until is None else turn.until
    _prove_text(turn, turn.prompt, until_text, "its prompt", "the turn's rendering")
    _prove_text(turn, until_text, text, "the rendering up to it", "the whole row")
    start = len(prompt)
    if full[:start] != prompt:
        raise _tokens_part(tokenizer, turn, prompt, full)
    if turn.until is None:
        return start, len(full)
    until = ids[turn.until]
    closing = [i for i in range(start, len(until)) if until[i] in special.closers]
    if not closing or _decode(tokenizer, until[closing[-1] + 1 :]).strip():
        raise Refusal(
            f"{turn.name} has no end of turn: its rendering ends with {turn.until[-30:]!r}, in which no special "
            "token closes the turn, so the model would never learn to stop; use a chat template that closes it."
        )
    end = closing[-1] + 1
    if full[:end] != until[:end]:
        raise _tokens_part(tokenizer, turn, until[:end], full)
    return start, end


def _prove_text(turn: Turn, part: str, whole: str, part_name: str, whole_name: str) -> None:
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    raise Refusal(
        f"{turn.name}: the chat template is not prefix-stable here: after {part[max(0, at - 30) : at]!r} {part_name} "
        f"goes on with {part[at : at + 30]!r} and {whole_name} with {whole[at : at + 30]!r}; choose loss_on "
        "last_assistant or split the row into one row a turn."
    )


def _tokens_part(tokenizer: PreTrainedTokenizerBase, turn: Turn, part: Sequence[int], whole: Sequence[int]) -> Refusal:
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    common = _decode(tokenizer, part[:at])[-30:]
    advice = "move white space from the end of the prompt to the beginning of the completion."
    if turn.until is not None:
        advice = "the chat template ends its generation prompt in the middle of a token; use one that does not."
    return Refusal(
        f"{turn.name}: its prompt is not a prefix of the row in tokens, since the tokenizer joins characters across "
        f"the border: after {common!r} the prompt has {_decode(tokenizer, part[at : at + 1])!r} and the row "
        f"{_decode(tokenizer, whole[at : at + 1])!r}; {advice}"
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text
