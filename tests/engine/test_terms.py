"""Sums and counts: the one place where a sum is divided."""

from __future__ import annotations

import pytest
import torch

from lightning_ft.engine.terms import Term, Window
from lightning_ft.functional.errors import Refusal


def term(value: float, count: float, unit: str = "token", weight: float = 1.0) -> Term:
    return Term("t", torch.tensor(value, dtype=torch.float64), count, unit, weight)


def test_with_totals_the_micro_losses_average_to_the_window_s_exact_mean() -> None:
    """Lightning divides by the accumulation and DDP by the ranks, so those cancel."""
    sums, counts = [3.0, 5.0, 7.0, 1.0], [1.0, 4.0, 2.0, 2.0]
    window = Window(accumulate=2, world_size=2)
    losses = [window.loss(term(s, c, weight=0.5), {"token": 9.0}) for s, c in zip(sums, counts, strict=True)]
    assert float(sum(losses)) / (2 * 2) == pytest.approx(0.5 * 16 / 9, abs=1e-15)
    assert not window.pending


def test_a_window_without_units_contributes_zero_with_a_graph() -> None:
    value = torch.zeros((), requires_grad=True)
    loss = Window().loss(Term("t", value * 2, 0.0), {"token": 0.0})
    loss.backward()
    assert float(loss.detach()) == 0.0 and float(value.grad) == 0.0


def test_without_totals_the_correction_gives_the_exact_mean() -> None:
    window = Window(accumulate=2, world_size=1)
    total = 0.0
    for value, count in ((3.0, 1.0), (5.0, 4.0)):
        total += float(window.loss(term(value, count), None)) / 2
        window.count(count)
    assert window.pending
    counted, numerator = window.correction()
    assert total * numerator / counted == 8.0 / 5.0
    assert window.correction()[0] == 0.0


def test_ranks_divide_by_one_number_whatever_they_count() -> None:
    ranks = [Window(world_size=2), Window(world_size=2)]
    averaged = sum(float(w.loss(term(v, c), None)) for w, v, c in zip(ranks, (3.0, 5.0), (1.0, 4.0), strict=True)) / 2
    assert averaged * ranks[0].correction()[1] / 5.0 == 8.0 / 5.0


def test_a_mean_is_left_as_it_is() -> None:
    assert float(Window(4, 2).loss(term(3.0, 1.0, "mean", 0.5), None)) == 1.5


def test_units_that_cannot_be_normalised_are_refused() -> None:
    window = Window()
    window.loss(term(1.0, 1.0), None)
    with pytest.raises(Refusal, match="in tokens and in rows"):
        window.loss(term(1.0, 1.0, "row"), None)
    with pytest.raises(Refusal, match="counts in pairs"):
        window.loss(term(1.0, 1.0, "pair"), {"token": 1.0})
