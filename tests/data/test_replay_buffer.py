"""The reservoir is uniform, balanced where asked, and goes on exactly; rows survive being taken out of a batch and put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_ft.data.batch_rows import batch_of, rows_of
from lightning_ft.data.collate import Segment, collate
from lightning_ft.data.collate_labelled import LabelledSegment, collate_labelled
from lightning_ft.data.collate_pairs import Answer, PairSegment, collate_pairs
from lightning_ft.data.replay_buffer import ReplayBuffer, placed
from lightning_ft.functional.errors import Refusal


def row(number: int) -> dict:
    return {"plain": torch.tensor(number)}


def kept(buffer: ReplayBuffer, group: str = "") -> list[int]:
    return [int(one["plain"]) for one in buffer.groups.get(group, [])]


def test_every_row_seen_has_the_same_chance() -> None:
    """Chi-squared over 2,000 buffers of 6 of 20 rows; each row's count is hypergeometric, not binomial, hence the factor."""
    counts = np.zeros(20)
    for seed in range(2000):
        buffer = ReplayBuffer(6, seed)
        for number in range(20):
            buffer.add(row(number))
        assert len(buffer) == 6 and buffer.num_seen == 20
        counts[kept(buffer)] += 1
    share = 6 / 20
    statistic = ((counts - 2000 * share) ** 2 / (2000 * share * (1 - share))).sum() * 19 / 20
    assert stats.chi2.sf(statistic, df=19) > 0.01
    # Keeping the first six, or the last, is refused by the same test by a wide margin.
    wrong = np.where(np.arange(20) < 6, 2000.0, 0.0)
    assert stats.chi2.sf(((wrong - 600) ** 2 / 420).sum() * 19 / 20, df=19) < 1e-100


def test_balanced_groups_have_equal_shares_and_stay_uniform() -> None:
    counts = np.zeros(30)
    for seed in range(1500):
        buffer = ReplayBuffer(10, seed)
        for number in range(30):
            buffer.add(row(number), "a")
        for number in range(8):
            buffer.add(row(number), "b")
        assert [len(buffer.groups[g]) for g in "ab"] == [5, 5]
        counts[kept(buffer, "a")] += 1
    share = 5 / 30
    statistic = ((counts - 1500 * share) ** 2 / (1500 * share * (1 - share))).sum() * 29 / 30
    assert stats.chi2.sf(statistic, df=29) > 0.01


def test_it_goes_on_exactly_from_its_state() -> None:
    whole, parts = ReplayBuffer(5, 3), ReplayBuffer(5, 3)
    for number in range(40):
        whole.add(row(number), "ab"[number % 2])
    for number in range(17):
        parts.add(row(number), "ab"[number % 2])
    again = ReplayBuffer(5, 3)
    again.load(parts.state())
    for number in range(17, 40):
        again.add(row(number), "ab"[number % 2])
    assert [kept(again, g) for g in "ab"] == [kept(whole, g) for g in "ab"] and again.num_seen == whole.num_seen
    assert [int(r["plain"]) for r in again.draw(3, 7)] == [int(r["plain"]) for r in whole.draw(3, 7)]
    assert len({tuple(int(r["plain"]) for r in whole.draw(3, key)) for key in range(20)}) > 5
    assert not set(kept(whole, "a")) & {int(r["plain"]) for r in whole.draw(5, 1, without="a")}


def test_a_smaller_one_takes_as_many_rows_as_it_has_room_for() -> None:
    large, small = ReplayBuffer(12, 3), ReplayBuffer(5, 3)
    for number in range(20):
        large.add(row(number), "ab"[number % 2])
    small.load(large.state())
    assert [len(small.groups[g]) for g in "ab"] == [3, 2] and small.seen == large.seen
    assert all(set(kept(small, g)) < set(kept(large, g)) for g in "ab")
    small.add(row(20), "a")
    assert len(small) == 5 and len(large) == 12


def test_a_window_s_rows_are_divided_without_rest() -> None:
    rows = [row(n) for n in range(7)]
    pieces = [placed(rows, micro, 2, rank, 2) for micro in range(2) for rank in range(2)]
    assert sum(pieces, []) == rows and [len(piece) for piece in pieces] == [1, 2, 2, 2]


def segments(n: int = 5) -> list[Segment]:
    drawn = np.random.default_rng(0)
    return [Segment(drawn.integers(1, 9, 4 + k), np.array([[1 + k % 2, 3], [3, 4 + k]]), row=10 + k) for k in range(n)]


def pairs(n: int = 4, margin: float | None = 0.5) -> list[PairSegment]:
    drawn = np.random.default_rng(1)
    found = []
    for k in range(n):
        other = Answer(drawn.integers(1, 9, 2 + k), np.array([[0, 2 + k]]))
        found.append(PairSegment(drawn.integers(1, 9, 5 + k), np.array([[3, 5 + k]]), k, 3, other, margin))
    return found


def labelled(n: int = 3) -> list[LabelledSegment]:
    drawn, none = np.random.default_rng(2), np.empty(0, dtype=np.int64)
    ids = [drawn.integers(1, 9, 3 + k) for k in range(n)]
    return [
        LabelledSegment(
            i, np.empty((0, 2), dtype=np.int64), k, np.zeros(len(i), dtype=np.int64), none, none, np.asarray(k)
        )
        for k, i in enumerate(ids)
    ]


def equal(one, other) -> None:
    for name in (
        "ids",
        "positions",
        "bounds",
        "mask",
        "scored",
        "labels",
        "segment_of_scored",
        "rows",
        "targets",
        "shared",
    ):
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    assert one.columns.keys() == other.columns.keys()
    assert all(torch.equal(one.columns[name], other.columns[name]) for name in one.columns)
    assert all(one.counts[unit] == other.counts[unit] for unit in other.counts)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["text", "pairs", "shared pairs", "labelled"])
def test_a_batch_taken_apart_and_joined_is_the_same_batch(kind: str, packed: bool) -> None:
    """Also in another order, in which it equals the batch that the data module would have made of that order."""
    make = {
        "text": lambda rows: collate(rows, packed=packed),
        "pairs": lambda rows: collate_pairs(rows, packed=packed, shared=False, window=None, task=None),
        "shared pairs": lambda rows: collate_pairs(rows, packed=packed, shared=packed, window=None, task=None),
        "labelled": lambda rows: collate_labelled(rows, packed=packed, window=None, task=None, void=np.asarray(0)),
    }[kind]
    rows = {"text": segments, "labelled": labelled}.get(kind, pairs)()
    batch = make(rows)
    if "pairs" in kind:
        batch.columns["reference_logps"] = torch.arange(2.0 * len(rows))
    taken = rows_of(batch)
    equal(batch_of(taken, packed=packed), batch)
    order = list(reversed(range(len(rows))))
    other = make([rows[n] for n in order])
    if "pairs" in kind:
        other.columns["reference_logps"] = torch.arange(2.0 * len(rows)).reshape(-1, 2).flip(0).reshape(-1)
    equal(batch_of([taken[n] for n in order], packed=packed), other)


def test_fillers_are_left_out_and_a_user_s_rows_come_back() -> None:
    assert rows_of(collate([], packed=True)) == []
    batch = [torch.arange(6).reshape(3, 2), {"y": torch.tensor([7, 8, 9])}]
    taken = rows_of(batch)
    back = batch_of([taken[2], taken[0]])
    assert back[0].tolist() == [[4, 5], [0, 1]] and back[1]["y"].tolist() == [9, 7]
    with pytest.raises(Refusal, match="rows in their first dimension.*first dimensions"):
        rows_of([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(Refusal, match="and it holds a str"):
        rows_of(["text"])
