"""Batches of answers behind prompts against a brute-force account: what each scored token is predicted from, and as what."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ft.data.collate_pairs import Answer, PairSegment, UnpairedSegment, collate_pairs, collate_unpaired
from lightning_ft.engine.batch import Batch
from lightning_ft.nn.shared_segments import check_shared

LAYOUTS = {
    "shared": {"packed": True, "shared": True},
    "separate": {"packed": True, "shared": False},
    "padded": {"packed": False, "shared": False},
}
IDS = st.lists(
    st.integers(0, 3), min_size=1, max_size=6
)  # few ids, zeros among them, so that nothing can be told by its id


@st.composite
def answers(draw: Any) -> Answer:
    ids = draw(IDS)
    edges = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=4)))
    spans = np.array(edges[: len(edges) // 2 * 2], dtype=np.int64).reshape(-1, 2)
    return Answer(np.array(ids), spans)


@st.composite
def pairs(draw: Any) -> PairSegment:
    prompt, chosen, rejected = draw(IDS), draw(answers()), draw(answers())
    ids = np.concatenate([np.array(prompt), chosen.ids])
    return PairSegment(
        ids, chosen.spans + len(prompt), draw(st.integers(0, 99)), len(prompt), rejected, draw(st.floats(0, 1))
    )


def expected(prompt: np.ndarray, answer: Answer) -> list[tuple[tuple[int, ...], int]]:
    """(all tokens before it, the token) of each token to learn, from the whole row."""
    row = [*prompt.tolist(), *answer.ids.tolist()]
    places = [len(prompt) + t for start, end in answer.spans.tolist() for t in range(start, end)]
    return [(tuple(row[:t]), row[t]) for t in places]


def account(batch: Batch) -> list[list[tuple[tuple[int, ...], int]]]:
    """The same of each segment of a batch, from what attention lets its predictors see."""
    flat, positions = batch.ids.reshape(-1).tolist(), batch.positions.reshape(-1).tolist()
    if batch.bounds is not None:
        edges = list(zip(batch.bounds, batch.bounds[1:], strict=False))
    else:
        assert batch.mask is not None
        width = batch.ids.shape[1]
        edges = [(i * width, i * width + int(n)) for i, n in enumerate(batch.mask.sum(1))]
    shared = batch.shared or (None,) * len(edges)
    found: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in edges]
    triples = (batch.scored.tolist(), batch.labels.tolist(), batch.segment_of_scored.tolist())
    for place, label, segment in zip(*triples, strict=True):
        (begin, end), lent = edges[segment], shared[segment]
        seen = [] if lent is None else list(range(edges[lent[0]][0], edges[lent[0]][0] + lent[1]))
        seen += [at for at in range(begin, end) if at <= place]
        assert place == seen[-1]  # the last token that is seen predicts
        assert [positions[at] for at in seen] == list(range(len(seen)))
        found[segment].append((tuple(flat[at] for at in seen), label))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(pairs(), min_size=1, max_size=4))
def test_pairs_are_scored_alike_in_every_layout(layout: str, rows: list[PairSegment]) -> None:
    batch = collate_pairs(rows, **LAYOUTS[layout], window={"pair": 9.0}, task="a")
    want = [expected(row.ids[: row.prompt], answer) for row in rows for answer in (row.chosen, row.rejected)]
    assert account(batch) == want
    assert batch.rows.tolist() == [row.row for row in rows for _ in range(2)]
    assert batch.columns["margin"].tolist() == torch.tensor([row.margin for row in rows]).tolist()
    assert batch.counts == {
        "pair": len(rows),
        "row": 2 * len(rows),
        "token": sum(map(len, want)),
        "chosen_token": sum(map(len, want[::2])),
    }
    assert batch.window == {"pair": 9.0} and batch.task == "a"
    whole = sum(2 * row.prompt + len(row.chosen.ids) + len(row.rejected.ids) for row in rows)
    assert batch.tokens == whole - (sum(row.prompt for row in rows) if layout == "shared" else 0)
    if batch.shared is not None:
        assert batch.bounds is not None
        check_shared(batch.bounds, batch.shared, causal=True)  # what attention takes


@pytest.mark.parametrize("mismatched", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.tuples(pairs(), st.booleans()), min_size=1, max_size=4))
def test_single_answers_and_mismatched_ones(
    layout: str, mismatched: bool, drawn: list[tuple[PairSegment, bool]]
) -> None:
    neighbour = Answer(np.array([1, 2]), np.array([[0, 2]]))
    rows = [
        UnpairedSegment(pair.ids, pair.spans, pair.row, pair.prompt, good, neighbour if len(drawn) == 1 else None)
        for pair, good in drawn
    ]
    batch = collate_unpaired(rows, **LAYOUTS[layout], mismatched=mismatched)
    want = [expected(row.ids[: row.prompt], row.answer) for row in rows]
    prompts = [row.ids[: row.prompt].tolist() for row in rows]
    meeting = {k: sum(prompts[i - k] == prompts[i] for i in range(len(rows))) for k in range(1, len(rows))}
    shift = next((k for k in meeting if meeting[k] == min(meeting.values())), 0)  # of those with the fewest the first
    others = [rows[i - shift].answer for i in range(len(rows))] if len(rows) > 1 else [neighbour]
    other = [expected(row.ids[: row.prompt], answer) for row, answer in zip(rows, others, strict=True)]
    assert account(batch) == want + (other if mismatched else [])
    assert batch.counts == {"token": sum(map(len, want)), "row": len(rows)}
    assert batch.rows.tolist() == [row.row for row in rows] + [-1] * len(rows) * mismatched
    assert batch.targets is not None and batch.targets.tolist() == [float(good) for _, good in drawn]
    assert batch.targets.dtype == torch.float32
    if batch.shared is not None:
        assert batch.bounds is not None
        check_shared(batch.bounds, batch.shared, causal=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fillers_count_zero_and_have_the_shape_of_a_batch(layout: dict[str, bool]) -> None:
    pair = collate_pairs([], **layout)
    single = collate_unpaired([], **layout, mismatched=True)
    for batch in (pair, single):
        assert set(batch.counts.values()) == {0.0} and len(batch.scored) == len(batch.labels) == 0
        assert batch.rows.tolist() == [-1, -1] and batch.ids.dtype == torch.int64
    assert set(pair.counts) == {"pair", "row", "token", "chosen_token"}
    assert single.targets is not None and single.targets.tolist() == [0.0]


def test_moving_a_batch_takes_its_columns_along() -> None:
    segment = PairSegment(np.array([1, 2]), np.array([[1, 2]]), 0, 1, Answer(np.array([3]), np.array([[0, 1]])), 0.5)
    moved = collate_pairs([segment], packed=True, shared=True).to("meta")
    assert moved.columns["margin"].device.type == moved.ids.device.type == "meta" and moved.bounds == (0, 2, 3)
    assert moved.shared == (None, (0, 1))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_model_gives_the_same_scores_in_every_layout(kind: str) -> None:
    from lightning_ft.models.causal import CausalLM
    from lightning_ft.objectives.causal_lm import scores
    from tests.models.architectures import build

    generator = np.random.default_rng(0)
    drawn = [[generator.integers(0, 64, size) for size in sizes] for sizes in ((5, 3, 6), (1, 1, 2), (9, 4, 1))]
    every = [[Answer(ids, np.array([[0, len(ids)]])) for ids in answers] for _, *answers in drawn]
    rows = [
        PairSegment(np.concatenate([prompt, one.ids]), one.spans + len(prompt), n, len(prompt), other, None)
        for n, ((prompt, *_), (one, other)) in enumerate(zip(drawn, every, strict=True))
    ]
    single = [UnpairedSegment(row.ids, row.spans, row.row, row.prompt, True) for row in rows]
    view = CausalLM(build(kind).eval())
    with torch.no_grad():
        pairs = [scores(view, collate_pairs(rows, **layout))["logprob"] for layout in LAYOUTS.values()]
        others = [
            scores(view, collate_unpaired(single, **layout, mismatched=True))["logprob"] for layout in LAYOUTS.values()
        ]
    for found in (pairs, others):
        for other in found[:-1]:
            torch.testing.assert_close(other, found[-1], atol=1e-5, rtol=1e-5)
