"""The plan's promises, for arbitrary sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ft.data.plan import epoch_order, micro_batches, pack_bins, plan_epoch, split_rows
from lightning_ft.functional.errors import Refusal

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=70).map(lambda values: np.array(values))
PLACES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))  # batch size, accumulation, ranks


def sets_of_windows(plan):
    """For each window the sorted rows of all its micro-batches and ranks."""
    found = []
    for begin in range(0, len(plan), plan.accumulate):
        ranks = [rows for micro in plan.micro[begin : begin + plan.accumulate] for rows in micro]
        found.append(sorted(np.concatenate(ranks).tolist()))
    return found


@settings(deadline=None, max_examples=60)
@given(LENGTHS, PLACES, st.booleans(), st.booleans(), st.integers(0, 5))
def test_every_row_once_and_equal_counts_per_rank(lengths, place, shuffle, bucket, epoch):
    batch_size, accumulate, world = place
    plan = plan_epoch(
        lengths,
        batch_size=batch_size,
        accumulate=accumulate,
        world_size=world,
        shuffle=shuffle,
        bucket=bucket,
        epoch=epoch,
    )
    rows = np.concatenate([rows for micro in plan.micro for rows in micro])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert {len(micro) for micro in plan.micro} == {world}
    assert max(len(rows) for micro in plan.micro for rows in micro) <= batch_size
    assert len(plan) == micro_batches(len(lengths), batch_size=batch_size, world_size=world)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.booleans(), st.booleans(), st.integers(0, 3))
def test_windows_are_the_same_rows_however_they_are_dealt(lengths, shuffle, bucket, epoch):
    common = {"shuffle": shuffle, "bucket": bucket, "epoch": epoch, "seed": 7}
    one = plan_epoch(lengths, batch_size=8, **common)
    for batch_size, accumulate, world in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8)):
        other = plan_epoch(lengths, batch_size=batch_size, accumulate=accumulate, world_size=world, **common)
        assert sets_of_windows(other) == sets_of_windows(one)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, PLACES, st.one_of(st.none(), st.integers(1, 20)), st.booleans())
def test_window_totals_are_the_brute_force_sums(lengths, place, limit, bins):
    batch_size, accumulate, world = place
    scored = lengths // 2
    size = {"max_tokens": 40} if bins else {"batch_size": batch_size}
    plan = plan_epoch(lengths, **size, units={"token": scored}, accumulate=accumulate, world_size=world, limit=limit)
    assert limit is None or len(plan) <= limit
    for i in range(len(plan)):
        token = row = 0
        for j in range(len(plan)):
            if j // accumulate == i // accumulate:
                for rows in plan.micro[j]:
                    token += sum(scored[r] for r in rows)
                    row += len(rows)
        assert plan.window(i) == {"token": token, "row": row}


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 3), st.integers(0, 4), st.booleans())
def test_bins_hold_every_row_once_within_their_capacity(lengths, world, epoch, shuffle):
    plan = plan_epoch(lengths, max_tokens=40, world_size=world, epoch=epoch, shuffle=shuffle)
    pieces = [rows for micro in plan.micro for rows in micro]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= 40 for rows in pieces)
    assert len(plan) == len(plan_epoch(lengths, max_tokens=40, world_size=world, epoch=0, shuffle=shuffle))


@settings(deadline=None, max_examples=60)
@given(LENGTHS)
def test_bins_are_best_fit_decreasing(lengths):
    """Against the textbook loop: the fullest bin that still takes the row. Which of two equal bins it is may differ."""
    loads: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, load in enumerate(loads) if load + length <= 33]
        if fitting:
            loads[max(fitting, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    assert sorted(int(lengths[rows].sum()) for rows in pack_bins(lengths, 33)) == sorted(loads)


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_order(50, seed=1, epoch=0)
    assert (first == epoch_order(50, seed=1, epoch=0)).all()
    assert (first != epoch_order(50, seed=1, epoch=1)).any()
    assert (first != epoch_order(50, seed=2, epoch=0)).any()
    assert (epoch_order(50, seed=1, epoch=3, shuffle=False) == np.arange(50)).all()
    assert epoch_order(5, seed=0, epoch=0).tolist() == [
        4,
        1,
        2,
        0,
        3,
    ]  # a resume with a newer numpy must find the same order


def test_bucketing_groups_like_lengths_inside_a_window():
    lengths = np.array([9, 1, 8, 2, 7, 3, 6, 4] * 4)
    plan = plan_epoch(lengths, batch_size=2, accumulate=4, bucket=True)
    plain = plan_epoch(lengths, batch_size=2, accumulate=4)
    spread = [sum(int(np.ptp(lengths[rows])) for micro in p.micro for rows in micro) for p in (plan, plain)]
    assert spread[0] < spread[1] / 3
    assert sets_of_windows(plan) == sets_of_windows(plain)


def test_the_last_window_is_spread_evenly_and_idle_ranks_get_nothing():
    plan = plan_epoch(np.full(10, 5), batch_size=4, accumulate=2, world_size=1, shuffle=False)
    assert [[len(rows) for rows in micro] for micro in plan.micro] == [[4], [4], [2]]
    plan = plan_epoch(np.full(13, 5), batch_size=4, accumulate=1, world_size=3, shuffle=False)
    assert [[len(rows) for rows in micro] for micro in plan.micro] == [[4, 4, 4], [1, 0, 0]]


def test_a_row_longer_than_a_bin_is_refused():
    with pytest.raises(Refusal, match="41 tokens and cannot go into a bin of max_tokens 40"):
        plan_epoch(np.array([3, 41]), max_tokens=40)


@pytest.mark.parametrize("rows, fraction, held", [(10, 0.0, 0), (10, 0.2, 2), (10, 0.01, 1), (2, 0.9, 1)])
def test_split_leaves_rows_on_both_sides(rows, fraction, held):
    kept, out = split_rows(rows, fraction, seed=3)
    assert len(out) == held and sorted([*kept.tolist(), *out.tolist()]) == list(range(rows))


def test_bins_of_many_rows_are_quick_and_tight():
    lengths = np.random.default_rng(0).integers(10, 900, 20_000)
    bins = pack_bins(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.99
