"""What holds for every conversation, every set of lengths and every placement, found by drawing many of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ft.data.collate import Segment, collate
from lightning_ft.data.loader import Placement, PlannedLoader
from lightning_ft.data.plan import pack_bins, plan_epoch
from lightning_ft.data.spans import render, render_rows
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import CHATML, LLAMA3, MISTRAL, tiny_tokenizer

few = settings(derandomize=True, deadline=None, max_examples=40)

# Words, spaces of all kinds, several scripts, an emoji of two code points, and what looks like markup.
WORD = st.sampled_from(
    ["yes", "no", " ", "\n", "\t", "  ", "ö", "中", "👍🏽", "<|im", "|>", "{{ x }}", "0", "'s", ".", "\u00a0", "é"]
)
SAID = st.lists(WORD, min_size=1, max_size=7).map("".join)
ANSWER = SAID.filter(lambda text: bool(text.strip()))
EXCHANGES = st.lists(st.tuples(SAID, ANSWER), min_size=1, max_size=4)

# template -> (tokenizer, what a turn of the assistant with this content is)
STYLES = {
    "chatml": (tiny_tokenizer(CHATML), lambda text: text + "<|im_end|>"),
    "llama3": (tiny_tokenizer(LLAMA3, puts_bos=True), lambda text: text.strip() + "<|eot_id|>"),
    "mistral": (tiny_tokenizer(MISTRAL), lambda text: " " + text + "</s>"),
}


def chat(exchanges: list[tuple[str, str]]) -> dict[str, Any]:
    pairs = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in exchanges]
    return {"messages": [turn for pair in pairs for turn in pair]}


@pytest.mark.parametrize("style", STYLES)
@few
@given(EXCHANGES)
def test_what_is_learned_is_what_the_assistant_said_and_its_end(style: str, exchanges: list[tuple[str, str]]) -> None:
    tokenizer, turn = STYLES[style]
    found = render(tokenizer, chat(exchanges))
    assert [tokenizer.decode(found.ids[a:b]) for a, b in found.spans] == [turn(answer) for _, answer in exchanges]
    edges = [0, *(edge for span in found.spans for edge in span), len(found.ids)]
    assert edges == sorted(edges) and all(a < b for a, b in found.spans)  # ascending, disjoint, inside, none empty
    assert (
        found.ids
        == tokenizer(
            tokenizer.apply_chat_template(chat(exchanges)["messages"], tokenize=False), add_special_tokens=False
        )["input_ids"]
    )
    assert found.scored == sum(b - a for a, b in found.spans)


@few
@given(EXCHANGES)
def test_the_last_turn_alone_and_the_whole_row_are_the_same_tokens(exchanges: list[tuple[str, str]]) -> None:
    tokenizer, row = STYLES["chatml"][0], chat(exchanges)
    every, last, whole = (render(tokenizer, row, on) for on in ("assistant", "last_assistant", "all"))
    assert every.ids == last.ids == whole.ids
    assert last.spans == every.spans[-1:] and whole.spans == [(0, len(whole.ids))]


@few
@given(st.lists(EXCHANGES, min_size=1, max_size=5))
def test_rows_do_not_change_with_their_neighbours(conversations: list[list[tuple[str, str]]]) -> None:
    tokenizer = STYLES["llama3"][0]
    rows = [chat(exchanges) for exchanges in conversations]
    assert render_rows(tokenizer, rows, "messages") == [render(tokenizer, row) for row in rows]


@settings(few, max_examples=80)
@given(SAID | st.just(""), ANSWER, st.booleans())
def test_a_completion_is_learned_whole_or_its_border_is_refused(prompt: str, completion: str, puts_bos: bool) -> None:
    tokenizer = BOS if puts_bos else NO_BOS
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    joined = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    try:
        found = render(tokenizer, {"prompt": prompt, "completion": completion})
    except Refusal as refusal:
        assert "not a prefix of the row in tokens" in str(refusal) and joined[: len(alone)] != alone
        return
    ((start, end),) = found.spans
    assert joined[: len(alone)] == alone and end == len(found.ids)
    assert tokenizer.decode(found.ids[start:]) == completion + "</s>"
    assert tokenizer.decode(found.ids[:start]) == ("<s>" if puts_bos else "") + prompt


BOS, NO_BOS = tiny_tokenizer(puts_bos=True), tiny_tokenizer()

# packing and dealing ----------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=90).map(np.array)
SEEDS = st.integers(0, 2**31)


@few
@given(LENGTHS, st.integers(40, 90), SEEDS, st.booleans())
def test_bins_hold_each_row_once_never_overflow_and_are_drawn_alike(
    lengths: np.ndarray, room: int, seed: int, shuffle: bool
) -> None:
    bins = pack_bins(lengths, room, seed=seed, shuffle=shuffle)
    assert np.sort(np.concatenate(bins)).tolist() == list(range(len(lengths)))
    assert max(int(lengths[rows].sum()) for rows in bins) <= room
    again = pack_bins(lengths.copy(), room, seed=seed, shuffle=shuffle)
    assert [rows.tolist() for rows in bins] == [rows.tolist() for rows in again]
    light = [int(lengths[rows].sum()) for rows in bins if 2 * int(lengths[rows].sum()) <= room]
    assert len(light) <= 1  # two bins no more than half full would have been one


class Rows:
    """Rows of a number each, as a loader sees them: row i has ``lengths[i]`` tokens, of which every second one is scored."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = self.widths = lengths
        self.units, self.copies = {"token": lengths // 2}, 1

    def __len__(self) -> int:
        return len(self.lengths)

    def segments(self, numbers: np.ndarray) -> list[Segment]:
        spans = {int(n): np.array([[t, t + 1] for t in range(1, int(self.lengths[n]), 2)]) for n in numbers}
        return [Segment(np.full(int(self.lengths[n]), 7 + n), spans[int(n)], int(n)) for n in numbers]


PLACES = st.builds(Placement, world_size=st.integers(1, 4), accumulate=st.integers(1, 4))
SIZES = st.one_of(
    st.builds(lambda rows: {"batch_size": rows}, st.integers(1, 5)),
    st.builds(lambda tokens: {"batch_size": 1, "max_tokens": tokens}, st.integers(40, 90)),
)


def rank_batches(
    rows: Rows, sizes: dict[str, int], place: Placement, rank: int, epoch: int, position: int = 0, **more: Any
) -> Any:
    where = replace(place, rank=rank, position=position)
    loader = PlannedLoader(rows, **sizes, placement=lambda: where, **more)  # type: ignore[arg-type]
    loader.set_epoch(epoch)
    return list(loader)


@few
@given(LENGTHS, SIZES, PLACES, st.integers(0, 3), SEEDS, st.booleans(), st.booleans())
def test_loaders_of_all_ranks(
    lengths: np.ndarray, sizes: dict[str, int], place: Placement, epoch: int, seed: int, packed: bool, shuffle: bool
) -> None:
    rows, packed = Rows(lengths), packed or "max_tokens" in sizes
    more = {"seed": seed, "packed": packed, "shuffle": shuffle}
    ranks = [rank_batches(rows, sizes, place, rank, epoch, **more) for rank in range(place.world_size)]
    # as many micro-batches on each, and each row on one of them
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [row for batches in ranks for batch in batches for row in batch.rows.tolist() if row >= 0]
    assert sorted(dealt) == list(range(len(lengths)))
    # what each batch says of its window is what the batches of the window hold
    for i in range(len(ranks[0])):
        begin = i - i % place.accumulate
        window = [batch for batches in ranks for batch in batches[begin : begin + place.accumulate]]
        for unit in ("token", "row"):
            held = sum(batch.counts[unit] for batch in window)
            assert all(batches[i].window[unit] == held for batches in ranks)
        assert sum(len(batch.labels) for batch in window) == ranks[0][i].window["token"]
    # a run that goes on at any place sees the rest
    position = seed % (len(ranks[0]) + 1)
    for rank, batches in enumerate(ranks):
        rest = rank_batches(rows, sizes, place, rank, epoch, position, **more)
        assert [b.ids.tolist() for b in rest] == [b.ids.tolist() for b in batches[position:]]
        assert [b.window for b in rest] == [b.window for b in batches[position:]]


@few
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_an_epoch_is_the_same_whatever_was_asked_before(
    lengths: np.ndarray, batch: int, world: int, accumulate: int, seed: int
) -> None:
    def epoch(number: int) -> list[list[list[int]]]:
        plan = plan_epoch(lengths, batch_size=batch, world_size=world, accumulate=accumulate, seed=seed, epoch=number)
        return [[rows.tolist() for rows in ranks] for ranks in plan.micro]

    third = epoch(3)
    epoch(0), epoch(1)
    assert epoch(3) == third


# batches ----------------------------------------------------------------------------------------------------------------


@st.composite
def segment(draw: st.DrawFn) -> Segment:
    ids = np.array(draw(st.lists(st.integers(0, 50), min_size=1, max_size=12)))
    edges = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=6)))
    spans = np.array(list(zip(edges[::2], edges[1::2], strict=False)), dtype=np.int64).reshape(-1, 2)
    return Segment(ids, spans, draw(st.integers(0, 1000)))


def content(batch: Any) -> tuple[Any, ...]:
    """Whatever a batch holds, told without its layout."""
    flat, position = batch.ids.reshape(-1), batch.positions.reshape(-1)
    if batch.bounds is None:
        pieces = [row[keep] for row, keep in zip(batch.ids, batch.mask, strict=True)]
        places = [row[keep] for row, keep in zip(batch.positions, batch.mask, strict=True)]
    else:
        edges = list(zip(batch.bounds, batch.bounds[1:], strict=False))
        pieces, places = [flat[a:b] for a, b in edges], [position[a:b] for a, b in edges]
    owner = batch.segment_of_scored.tolist()
    scored = list(zip(owner, position[batch.scored].tolist(), batch.labels.tolist(), strict=True))
    return [p.tolist() for p in pieces], [p.tolist() for p in places], scored, batch.rows.tolist(), batch.counts


@few
@given(st.lists(segment(), min_size=1, max_size=6))
def test_packed_and_padded_batches_hold_the_same(segments: list[Segment]) -> None:
    packed, padded = collate(segments, packed=True), collate(segments, packed=False)
    assert content(packed) == content(padded)
    pieces, places, scored, *_ = content(packed)
    assert pieces == [one.ids.tolist() for one in segments] and places == [
        list(range(len(one.ids))) for one in segments
    ]
    brute = [
        (number, t - 1, int(one.ids[t]))
        for number, one in enumerate(segments)
        for t in range(1, len(one.ids))
        if any(a <= t < b for a, b in one.spans.tolist())
    ]
    assert scored == brute
