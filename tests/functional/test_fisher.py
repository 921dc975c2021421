"""Shares of layers against autograd, example by example, in float64: one by one, added up by power, and with weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_ft.functional import fisher
from lightning_ft.functional.fisher import Groups, Lookup, Product, Share, Transposed, Values, gradient, total, weighted

EXAMPLES, WIDE, NARROW, ROWS = 4, 7, 5, 6
RAGGED = torch.tensor([0, 0, 0, 1, 2, 2, -1, 3])
SPREAD = torch.tensor([3, 0, 2, 0, -1, 1, 2, 0])


def layout(kind: str) -> Groups:
    if kind == "rows":
        return Groups.rows(EXAMPLES)
    index = RAGGED if kind == "packed" else SPREAD
    return Groups((1, len(index)), index, EXAMPLES)


def entries(groups: Groups, *features: int) -> Tensor:
    between = (3,) if groups.one_each else ()
    return torch.randn(*groups.shape, *between, *features, dtype=torch.float64)


def of_examples(groups: Groups, forward: Callable[[Tensor], Tensor], weight: Tensor, delta: Tensor) -> list[Tensor]:
    """Gradients of ``sum delta * output`` over the entries of each example."""
    found = []
    for s in range(EXAMPLES):
        own = (groups.index == s).reshape(groups.shape)
        own = own.reshape(*own.shape, *[1] * (delta.dim() - own.dim()))
        leaf = weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad((forward(leaf) * delta * own).sum(), leaf)
        found.append(grad)
    return found


def product(groups: Groups) -> tuple[Share, list[Tensor]]:
    x, delta = entries(groups, NARROW), entries(groups, WIDE)
    weight = torch.randn(WIDE, NARROW, dtype=torch.float64)
    return Product(x, delta, groups, factor=0.5), of_examples(groups, lambda w: 0.5 * (x @ w.t()), weight, delta)


def stored_the_other_way(groups: Groups) -> tuple[Share, list[Tensor]]:
    x, delta = entries(groups, NARROW), entries(groups, WIDE)
    weight = torch.randn(NARROW, WIDE, dtype=torch.float64)
    return Product(x, delta, groups, transposed=True), of_examples(groups, lambda w: x @ w, weight, delta)


def lookup(groups: Groups) -> tuple[Share, list[Tensor]]:
    ids, delta = entries(groups).mul(10).long().abs() % ROWS, entries(groups, WIDE)
    weight = torch.randn(ROWS, WIDE, dtype=torch.float64)
    expected = of_examples(groups, lambda w: torch.nn.functional.embedding(ids, w, 2), weight, delta)
    return Lookup(ids, delta, groups, ROWS, padding=2, scale=None), expected


def table_the_other_way(groups: Groups) -> tuple[Share, list[Tensor]]:
    share, expected = lookup(groups)
    return Transposed(share), [grad.t() for grad in expected]


def values(groups: Groups) -> tuple[Share, list[Tensor]]:
    given = torch.randn(EXAMPLES, WIDE, dtype=torch.float64)
    return Values(given, groups), list(given)


MAKERS = [product, stored_the_other_way, lookup, table_the_other_way, values]


@pytest.mark.parametrize("blocks", ["whole", "two rows", "one row"])
@pytest.mark.parametrize("kind", ["rows", "packed", "spread"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_share_is_a_loop_over_examples(
    make: Callable[[Groups], tuple[Share, list[Tensor]]], kind: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks != "whole":
        monkeypatch.setattr(fisher, "_AT_ONCE", 0)
        monkeypatch.setattr(fisher, "_CACHED", 2 * WIDE if blocks == "two rows" else 1)
    torch.manual_seed(0)
    share, expected = make(layout(kind))
    for s, grad in enumerate(expected):
        torch.testing.assert_close(gradient([share], s), grad)
    torch.testing.assert_close(total([share], 2), torch.stack(expected).square().sum(0))
    torch.testing.assert_close(total([share], 1), torch.stack(expected).abs().sum(0))
    weights = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=torch.float64)
    summed, size = weighted([share], weights)
    torch.testing.assert_close(summed, torch.einsum("s,s...->...", weights, torch.stack(expected)))
    assert size == pytest.approx(sum(abs(float(w)) * float(g.norm()) for w, g in zip(weights, expected, strict=True)))


def test_shares_of_several_calls_are_added_before_the_power() -> None:
    torch.manual_seed(0)
    (one, first), (other, second) = product(layout("packed")), product(layout("spread"))
    each = [a + b for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(total([one, other], 2), torch.stack(each).square().sum(0))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    summed, size = weighted([one, other], weights)
    torch.testing.assert_close(summed, sum(w * g for w, g in zip(weights, each, strict=True)))
    assert size == pytest.approx(sum(float(w * g.norm()) for w, g in zip(weights, each, strict=True)))


def test_entries_that_follow_one_another_are_not_copied() -> None:
    places = layout("packed").places
    assert places == [slice(0, 3), slice(3, 4), slice(4, 6), slice(7, 8)]
    spread = layout("spread").places
    assert isinstance(spread[0], Tensor) and spread[0].tolist() == [1, 3, 7] and spread[1] == slice(5, 6)
