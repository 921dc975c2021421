"""The synthetic stream of benchmarks/continual_synthetic.py, cut short, against an independent numpy program."""

import warnings

import pytest

from benchmarks.continual_synthetic import run

# Two tasks of one epoch, seed 0, by that program with the exact information: (accuracy, backward transfer).
NUMPY = {"naive": (0.7615, -0.261), "ewc all lam=30": (0.7885, -0.155)}


@pytest.mark.parametrize("method", NUMPY)
def test_two_tasks_are_those_of_the_numpy_program(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loop without a validation, a log or a checkpoint
        found = run(method, 0, tasks=2, epochs=1)
    accuracy, transfer = NUMPY[method]
    # 2,000 held-out rows, of which single ones flip between float32 and float64.
    assert found["accuracy"] == pytest.approx(accuracy, abs=0.004)
    assert found["backward_transfer"] == pytest.approx(transfer, abs=0.006)
