"""Task sampling: chi-squared against the intended distributions, and what an epoch holds."""

import math

import numpy as np
import pytest
from scipy.stats import chisquare

from lightning_ft.functional.relative_improvement import relative_improvement
from lightning_ft.functional.task_sampling import probabilities, rows_in_tasks, task_sequence

SIZES = [900, 90, 10]
INTENDED = {
    "proportional": ({}, [0.9, 0.09, 0.01]),
    "temperature": ({"temperature": 2.0}, [30 / (30 + 90**0.5 + 10**0.5), 90**0.5 / (30 + 90**0.5 + 10**0.5), None]),
    "uniform": ({}, [1 / 3, 1 / 3, 1 / 3]),
    "annealed": ({"progress": 1.0}, [900**0.2, 90**0.2, 10**0.2]),
    "weighted": ({"weights": [1.0, 2.0, 1.0]}, [0.25, 0.5, 0.25]),
    "loss_driven": ({"ratios": [0.1, 1.0, 2.0]}, [90.0, 90.0, 20.0]),
}


def intended(method: str) -> np.ndarray:
    shares = INTENDED[method][1]
    if shares[-1] is None:
        shares = [*shares[:-1], 1 - sum(shares[:-1])]
    return np.array(shares) / sum(shares)


@pytest.mark.parametrize("method", INTENDED)
def test_draws_have_the_intended_distribution(method: str) -> None:
    chances = probabilities(SIZES, method, **INTENDED[method][0])
    np.testing.assert_allclose(chances, intended(method), rtol=1e-12)
    drawn = np.bincount(task_sequence(chances, 30_000, seed=1, epoch=2), minlength=3)
    assert chisquare(drawn, 30_000 * intended(method)).pvalue > 0.01
    wrong = np.roll(intended(method), 1) * 0.2 + intended(method) * 0.8
    if method != "uniform":
        assert chisquare(drawn, 30_000 * wrong).pvalue < 1e-6, "the test could not tell"


def test_neighbouring_draws_are_independent() -> None:
    drawn = task_sequence(np.array([0.5, 0.5]), 40_000, seed=0, epoch=0)
    pairs = np.bincount(2 * drawn[:-1] + drawn[1:], minlength=4)
    assert chisquare(pairs).pvalue > 0.01


def test_a_cap_bounds_large_tasks() -> None:
    np.testing.assert_allclose(probabilities(SIZES, cap=90), np.array([90, 90, 10]) / 190)


def test_tasks_in_turn() -> None:
    assert task_sequence(np.ones(3) / 3, 7, seed=0, epoch=0, in_turn=True).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert task_sequence(np.ones(3) / 3, 7, seed=0, epoch=1, in_turn=True).tolist() == [1, 2, 0, 1, 2, 0, 1]


def test_epochs_differ_and_are_the_same_each_time() -> None:
    chances = probabilities(SIZES)
    one, again, other = (task_sequence(chances, 50, seed=3, epoch=e) for e in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


def test_no_row_comes_twice_before_all_came_once() -> None:
    tasks = task_sequence(np.array([0.5, 0.5]), 60, seed=0, epoch=0)
    rows = rows_in_tasks(tasks, [7, 100], seed=0, epoch=0)
    small = rows[tasks == 0]
    for begin in range(0, len(small) - 6, 7):
        assert sorted(small[begin : begin + 7]) == list(range(7))
    large = rows[tasks == 1]
    assert len(set(large)) == len(large)
    assert rows_in_tasks(tasks, [7, 100], seed=0, epoch=0, shuffle=False)[tasks == 1].tolist() == list(
        range(len(large))
    )


def test_relative_improvement_by_hand() -> None:
    found = relative_improvement({"a": 0.9, "b": 2.0}, {"a": 0.6, "b": 1.0}, lower=frozenset({"b"}))
    assert found == pytest.approx((0.5 - 1.0) / 2)
    assert math.isnan(relative_improvement({"a": 0.4}, {"a": 0.0})) and math.isnan(relative_improvement({}, {}))
