"""sum_scores against dense float64 autograd and against one score after another; its products, its memory, its promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ft.functional import token_scores as ts
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import LanguageHead
from lightning_ft.nn.head_sums import AddingLinear, Summed, is_bare, sum_each, sum_scores
from tests.nn.test_head import DIVERGENCES, HEADS, D, N, V, Watch, dense, problem
from tests.tolerances import TOL

SIZE = V - 4
"""Of a vocabulary that is padded."""


def losses(
    q: Callable[[slice], Any], output: str, size: int | None = None, weights: tuple[float, float] = (0.3, 0.5)
) -> list[Summed]:
    """A log-likelihood at temperature 1 and a divergence at 2, times 4, as distillation has them."""
    soft = Summed(output, 4.0, weights[1], temperature=2.0, other=q, size=size, chunk_size=4)
    return [Summed(weight=weights[0], chunk_size=5), soft]


def total(made: list[Summed], scale: float = 1.7) -> Tensor:
    """What is differentiated: the losses at their weights, divided by a count."""
    found = torch.zeros((), dtype=torch.float64)
    for one in made:
        assert one.sum is not None
        found = found + scale * one.weight * one.sum
    return found


class View(LanguageHead):
    """A head with scaling and soft-capping after it, as models have them."""

    def __init__(self, head: nn.Module, cap: float | None = None) -> None:
        self.head, self.cap = head, cap

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.head(hidden)
        return z if self.cap is None else torch.tanh(z * 0.5 / self.cap) * self.cap


@pytest.mark.parametrize("output", DIVERGENCES)
@pytest.mark.parametrize("size", [None, SIZE])
def test_every_divergence_beside_a_loss_equals_dense_autograd(output: str, size: int | None) -> None:
    """Of a bare trained layer with a bias, whose gradient is added up in place, and by autograd."""
    hidden, labels, q, _ = problem(torch.float64)
    labels = labels.clamp(max=SIZE - 1)
    head = HEADS["bias"]().double().linear
    plain = dense(hidden, labels, head, q, 1.0)["logprob"]
    soft = dense(hidden, labels, lambda h: head(h)[:, :size], q[:, :size], 2.0)[output]
    leaves = [hidden, *head.parameters()]
    expected = torch.autograd.grad(1.7 * (0.3 * -plain.sum() + 0.5 * 4.0 * soft.sum()), leaves)
    adding = AddingLinear(head)
    for of, added in ((head, None), (adding, adding.added)):
        made = losses(lambda rows: q[rows, :size], output, size)
        sum_scores(hidden, labels, of, made, added=added)
        for one, value in zip(made, (-plain.sum(), 4.0 * soft.sum()), strict=True):
            torch.testing.assert_close(one.sum, value, atol=TOL[torch.float64], rtol=1e-12)
        for found, wanted in zip(torch.autograd.grad(total(made), leaves), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=TOL[torch.float64], rtol=1e-10)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("trained", ["frozen", "factors", "all"])
@pytest.mark.parametrize("output", ["reverse_kl", "topk_kl"])
def test_every_head_equals_one_score_after_another(kind: str, trained: str, output: str) -> None:
    """The gradients of what is trained in the head among them, LoRA factors on a frozen layer too."""
    hidden, labels, q, _ = problem(torch.float64)
    head = HEADS[kind]().double().requires_grad_(trained == "all")
    if trained == "factors":
        [p.requires_grad_() for p in (head.a, head.b) if p is not None]
    kept = ts.TopK(*ts.top_k(ts.distribution(q, 2.0), 5))
    other = kept.block if output == "topk_kl" else lambda rows: q[rows]
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    found = []
    for of in (sum_scores, None):
        made = losses(other, output)
        if of is not None:
            of(hidden, labels, head, made)
        else:
            view = View(head)
            sum_each(hidden, labels, made, view.score)
        found.append(([one.sum for one in made], torch.autograd.grad(total(made), leaves)))
    for a, b in zip(found[0][0] + list(found[0][1]), found[1][0] + list(found[1][1]), strict=True):
        torch.testing.assert_close(a, b, atol=TOL[torch.float64], rtol=1e-10)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_view_s_own_pass_equals_dense_autograd(cap: float | None) -> None:
    """Through what the architecture does after its head, whose backward looks at the logits."""
    hidden, labels, q, _ = problem(torch.float64)
    view = View(nn.Linear(D, V, bias=False).double(), cap)
    plain, soft = (dense(hidden, labels, view.logits, q, t) for t in (1.0, 2.0))
    leaves = [hidden, view.head.weight]
    expected = torch.autograd.grad(1.7 * (0.3 * -plain["logprob"].sum() + 2.0 * soft["forward_kl"].sum()), leaves)
    made = losses(lambda rows: q[rows], "forward_kl")
    view.sum_scores(hidden, labels, made)
    for found, wanted in zip(torch.autograd.grad(total(made), leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=TOL[torch.float64], rtol=1e-10)


def test_numerical_differences() -> None:
    hidden, labels, q, _ = problem(torch.float64)
    head = HEADS["everything"]().double()

    def f(h: Tensor, *_: Tensor) -> Tensor:
        made = losses(lambda rows: q[rows], "skewed_kl")
        sum_scores(h, labels, head, made)
        return total(made)

    assert torch.autograd.gradcheck(f, (hidden, *head.parameters()))


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 3)])
def test_no_logits_beyond_a_chunk_and_three_products_for_two_losses(trained: bool, products: int) -> None:
    torch.manual_seed(0)
    rows, chunk = 96, 24
    hidden = torch.randn(rows, D, requires_grad=True)
    view = View(nn.Linear(D, V, bias=False).requires_grad_(trained))
    q = torch.randn(chunk, V)
    made = [Summed(chunk_size=chunk), Summed("forward_kl", 4.0, 0.5, temperature=2.0, other=lambda _: q)]
    with Watch() as watch:
        view.sum_scores(hidden, torch.randint(V, (rows,)), made)
        total(made).backward()
    assert 0 < watch.largest <= chunk * V
    assert watch.products == products * rows // chunk


def test_tied_weights_get_the_gradients_of_both_uses() -> None:
    torch.manual_seed(0)
    ids, labels, q = torch.randint(V, (N,)), torch.randint(V, (N,)), torch.randn(N, V).double()
    head = nn.Linear(D, V, bias=False).double()
    hidden = torch.tanh(head.weight[ids])
    plain, soft = (dense(hidden, labels, head, q, t) for t in (1.0, 2.0))
    loss = 0.3 * -plain["logprob"].sum() + 2.0 * soft["forward_kl"].sum()
    (expected,) = torch.autograd.grad(1.7 * loss, head.weight)
    made = losses(lambda rows: q[rows], "forward_kl")
    View(head).sum_scores(torch.tanh(head.weight[ids]), labels, made)
    (found,) = torch.autograd.grad(total(made), head.weight, retain_graph=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    (again,) = torch.autograd.grad(total(made, 3.4), head.weight)  # what was kept is not used up
    torch.testing.assert_close(again, 2 * expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    """bfloat16 weights, or float32 ones under autocast, whose gradients stay float32."""
    hidden, labels, q, _ = problem(torch.float64)
    head = nn.Linear(D, V).double()
    plain, soft = (dense(hidden, labels, head, q, t) for t in (1.0, 2.0))
    leaves = [hidden, *head.parameters()]
    expected = torch.autograd.grad(0.3 * -plain["logprob"].sum() + 2.0 * soft["forward_kl"].sum(), leaves)
    dtype = torch.float32 if autocast else torch.bfloat16
    low, head = hidden.detach().to(dtype).requires_grad_(), head.to(dtype)
    made = losses(lambda rows: q[rows].to(torch.bfloat16), "forward_kl")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        View(head).sum_scores(low, labels, made)
    total(made, 1.0).backward()  # outside autocast, as Lightning runs it
    for leaf, wanted in zip([low, *head.parameters()], expected, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        scale = float(wanted.abs().max())
        torch.testing.assert_close(leaf.grad.double(), wanted, atol=3 * TOL[torch.bfloat16] * scale, rtol=0)


def test_weights_that_turn_out_otherwise_are_an_error_and_a_single_loss_has_any() -> None:
    hidden, labels, q, _ = problem(torch.float64)
    head = nn.Linear(D, V).double()
    made = losses(lambda rows: q[rows], "forward_kl")
    sum_scores(hidden, labels, head, made)
    with pytest.raises(RuntimeError, match=r"were to be weighed \[0.3, 0.5\]"):
        (made[0].sum + made[1].sum).backward()
    alone = losses(lambda rows: q[rows], "forward_kl")[1:]
    sum_scores(hidden, labels, head, alone)
    (found,) = torch.autograd.grad(-3.0 * alone[0].sum, hidden)
    soft = dense(hidden, labels, head, q, 2.0)["forward_kl"]
    (expected,) = torch.autograd.grad(-12.0 * soft.sum(), hidden)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_a_loss_without_weight_is_told_and_not_learned() -> None:
    hidden, labels, q, _ = problem(torch.float64)
    head = nn.Linear(D, V).double()
    made = losses(lambda rows: q[rows], "forward_kl", weights=(0.0, 1.0))
    sum_scores(hidden, labels, head, made)
    torch.testing.assert_close(made[0].sum, -dense(hidden, labels, head, q, 1.0)["logprob"].sum())
    (found,) = torch.autograd.grad(total(made, 1.0), hidden)
    soft = dense(hidden, labels, head, q, 2.0)["forward_kl"]
    torch.testing.assert_close(found, *torch.autograd.grad(4.0 * soft.sum(), hidden), atol=1e-10, rtol=0)


def test_a_head_on_a_frozen_trunk_and_nothing_at_all() -> None:
    hidden, labels, q, _ = problem(torch.float64)
    head = nn.Linear(D, V).double()
    soft = dense(hidden, labels, head, q, 2.0)["forward_kl"]
    (expected,) = torch.autograd.grad(4.0 * soft.sum(), head.weight)
    for view in (View(head), View(nn.Sequential(head))):
        alone = losses(lambda rows: q[rows], "forward_kl")[1:]
        view.sum_scores(hidden.detach(), labels, alone)
        torch.testing.assert_close(*torch.autograd.grad(alone[0].sum, head.weight), expected, atol=1e-10, rtol=0)
        with torch.no_grad():
            view.sum_scores(hidden, labels, alone)
        assert not alone[0].sum.requires_grad
        torch.testing.assert_close(alone[0].sum, 4.0 * soft.sum())


def test_no_tokens_are_a_connected_zero() -> None:
    """A rank without scored tokens gets gradients of zero, not None."""
    view, start = View(nn.Linear(D, V)), torch.randn(3, D, requires_grad=True)
    made = losses(lambda rows: pytest.fail("no rows"), "forward_kl")
    view.sum_scores(start[:0], torch.zeros(0, dtype=torch.long), made)
    sum(one.sum for one in made).backward()
    for leaf in (start, *view.head.parameters()):
        assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("why", ["a unit of its own", "float16"])
def test_gradients_are_left_to_backward_where_they_have_to_be(why: str, monkeypatch) -> None:
    """The weights of losses may change then."""
    hidden, labels, q, _ = problem(torch.float32)
    view = View(nn.Linear(D, V))
    monkeypatch.setattr("lightning_ft.models.causal._sharded_by_itself", lambda head: why == "a unit of its own")
    made = losses(lambda rows: q[rows], "forward_kl")
    with torch.autocast("cpu", dtype=torch.float16, enabled=why == "float16"):
        view.sum_scores(hidden, labels, made)
    (made[0].sum + made[1].sum).backward()
    plain, soft = (dense(hidden, labels, view.head, q, t) for t in (1.0, 2.0))
    (expected,) = torch.autograd.grad(-plain["logprob"].sum() + 4.0 * soft["forward_kl"].sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected, atol=2e-2 if why == "float16" else 1e-4, rtol=1e-2)


def test_only_a_bare_layer_is_taken_apart() -> None:
    assert is_bare(nn.Linear(D, V))
    hooked = nn.Linear(D, V)
    hooked.register_forward_hook(lambda *_: None)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    assert not any(is_bare(head) for head in (hooked, normed, nn.Sequential(nn.Linear(D, V))))


def test_refusals() -> None:
    hidden, labels, _, _ = problem(torch.float64)
    head = nn.Linear(D, V).double()
    with pytest.raises(Refusal, match="second distribution"):
        sum_scores(hidden, labels, head, [Summed("forward_kl")])
    with pytest.raises(Refusal, match="one vocabulary"):
        sum_scores(hidden, labels, head, [Summed("forward_kl", other=lambda r: torch.zeros(N, V + 1), chunk_size=N)])
    with pytest.raises(Refusal, match="leave positions"):
        sum_scores(hidden, labels - V, head, [Summed()])
