"""How the answers of a round are dealt and laid out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_ft.data.rollouts.collate import Rollout, collate_rollouts
from lightning_ft.data.rollouts.deal import deal_round, micro_batches

SAMPLES, PROMPTS = 4, 6
S = SAMPLES * PROMPTS
LENGTHS = np.arange(1, S + 1)
ALL = np.ones(S, dtype=bool)
SPLITS = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)]


def windows(plan):
    """The answers of each optimizer step."""
    step = plan.accumulate
    for begin in range(0, len(plan), step):
        yield sorted(int(row) for ranks in plan.micro[begin : begin + step] for part in ranks for row in part)


def deal(kept, split, **more):
    size, accumulate, ranks = split
    return deal_round(kept, LENGTHS, samples=SAMPLES, batch_size=size, accumulate=accumulate, world_size=ranks, **more)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_each_kept_answer_comes_once_a_pass_and_steps_do_not_depend_on_the_split(passes, share):
    kept = np.random.default_rng(0).random(S) < share if share < 1 else ALL
    steps = []
    for size, accumulate, ranks in SPLITS:
        plan = deal(kept, (size, accumulate, ranks), passes=passes, seed=3, number=2)
        count = micro_batches(S, batch_size=size, world_size=ranks, accumulate=accumulate, passes=passes)
        assert len(plan) == count and count % accumulate == 0
        assert all(len(part) <= size for one in plan.micro for part in one)
        steps.append(list(windows(plan)))
        whole = count // accumulate // passes
        for one in range(passes):
            assert sorted(itertools.chain(*steps[-1][one * whole : (one + 1) * whole])) == np.flatnonzero(kept).tolist()
        sizes = [len(step) for step in steps[-1]]
        assert max(sizes) - min(sizes) <= 1, "steps of a round see equally many"
        for i in range(len(plan)):
            own = steps[-1][i // accumulate]
            assert plan.window(i) == {"row": len(own), "token": sum(LENGTHS[own])}
    assert all(found == steps[0] for found in steps)


def test_answers_to_a_prompt_stay_together_and_passes_differ():
    plan = deal(ALL, (8, 1, 1), passes=2, seed=3)
    for ranks in plan.micro:
        groups = (ranks[0] // SAMPLES).tolist()
        assert groups == sorted(groups, key=groups.index), "a group is not torn apart"
        assert len(set(groups)) == 2
    first, second = ([list(r[0]) for r in plan.micro[i : i + 3]] for i in (0, 3))
    assert first != second
    assert [list(r[0]) for r in deal(ALL, (8, 1, 1), seed=3, number=1).micro] != first
    still = deal(ALL, (8, 1, 1), shuffle=False)
    assert [int(row) for ranks in still.micro for row in ranks[0]] == list(range(S))


@pytest.mark.parametrize("split", SPLITS)
def test_two_answers_that_are_compared_meet_in_one_micro_batch(split):
    """Two of four are kept, of two prompts none: an odd number of pairs does not split evenly."""
    kept = np.zeros(S, dtype=bool)
    for prompt in range(2, PROMPTS):
        kept[prompt * SAMPLES + np.array([prompt % 3, 3])] = True
    plan = deal(kept, split, passes=2, seed=3, together=2)
    for ranks in plan.micro:
        for part in ranks:
            pairs = part.reshape(-1, 2)
            assert (pairs[:, 0] // SAMPLES == pairs[:, 1] // SAMPLES).all() and (pairs[:, 0] < pairs[:, 1]).all()
    seen = sorted(int(row) for ranks in plan.micro for part in ranks for row in part)
    assert seen == sorted(np.flatnonzero(kept).tolist() * 2)


def rollout(prompt, answer, group):
    tokens = {"advantages": torch.tensor([float(token) for token in answer])}
    return Rollout(np.array(prompt), np.array(answer), group, 10 + group, tokens)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_layout(packed, shared):
    """Every scored position stands before its token, and its columns follow."""
    if shared and not packed:
        return
    rollouts = [rollout([1, 2, 3], [4, 5], 0), rollout([1, 2, 3], [6], 0), rollout([7], [8, 9, 10], 1)]
    batch = collate_rollouts(rollouts, ["advantages"], packed=packed, shared=shared, window={"row": 3.0, "token": 6.0})
    assert batch.labels.tolist() == [4, 5, 6, 8, 9, 10] == batch.columns["advantages"].int().tolist()
    assert batch.segment_of_scored.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.rows.tolist() == [10, 10, 11] and batch.counts == {"row": 3.0, "token": 6.0}
    before = batch.ids.reshape(-1)[batch.scored].tolist()
    assert before == [3, 4, 3, 7, 8, 9]
    if packed:
        assert batch.ids.shape[1] == (10 if shared else 13)
    if shared:
        assert batch.shared == (None, (0, 3), None)
        assert batch.positions[0, 5].item() == 3, "the second answer goes on behind the prompt"


def test_a_filler_counts_nothing():
    batch = collate_rollouts([], ["advantages"], packed=True, shared=True)
    assert batch.counts == {"row": 0.0, "token": 0.0} and batch.rows.tolist() == [-1]
    assert len(batch.scored) == 0 == len(batch.columns["advantages"])
