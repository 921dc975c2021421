"""The overlap of two sets of rows: the paper's sum in float64, loops, and what shrinking does to each measure."""

import pytest
import torch

from lightning_ft.functional.subspace_overlap import overlap


def by_hand(new, old, measure):
    total = 0.0
    for a in new.tolist():
        for b in old.tolist():
            product = sum(x * y for x, y in zip(a, b, strict=True))
            if measure == "absolute":
                total += abs(product)
            elif measure == "squared":
                total += product**2
            else:
                total += product**2 / (sum(x * x for x in a) * sum(y * y for y in b))
    return total


@pytest.mark.parametrize("measure", ["cosine", "squared", "absolute"])
def test_it_is_the_sum_over_pairs_of_rows_and_its_gradient_is_right(measure):
    drawn = torch.Generator().manual_seed(0)
    new = torch.randn(3, 7, generator=drawn, dtype=torch.float64, requires_grad=True)
    old = torch.randn(5, 7, generator=drawn, dtype=torch.float64)
    assert overlap(new, old, measure).item() == pytest.approx(by_hand(new, old, measure), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: overlap(a, old, measure), (new,))


@pytest.mark.parametrize("measure", ["cosine", "squared", "absolute"])
def test_orthogonal_rows_and_rows_of_zeros_do_not_overlap(measure):
    rows = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    assert overlap(rows[:2], rows[2:], measure).item() == pytest.approx(0.0, abs=1e-12)
    none = torch.zeros(2, 6, requires_grad=True)
    value = overlap(none, rows.float(), measure)
    value.backward()
    assert value.item() == 0.0 and bool(torch.isfinite(none.grad).all())


@pytest.mark.parametrize(("measure", "power"), [("cosine", 0), ("squared", 2), ("absolute", 1)])
def test_shrinking_a_factor_is_no_way_out_of_the_cosine(measure, power):
    """Trap 12: the paper's measures fall with the size of the new factor, so that a large weight makes it vanish."""
    drawn = torch.Generator().manual_seed(2)
    new, old = (torch.randn(n, 9, generator=drawn, dtype=torch.float64) for n in (2, 4))
    whole = overlap(new, old, measure)
    assert overlap(new / 10, old, measure).item() == pytest.approx(whole.item() / 10**power, rel=1e-12)
