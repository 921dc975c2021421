"""The gradient pipeline's parts on their own; tests/seams has them in a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ft.engine.gradients import TermGradients, audit, scale_
from lightning_ft.functional.errors import Refusal


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()


def losses(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [module(x).square().sum(), module[0](x).sum()]


def test_rows_add_up_over_a_window_and_are_weighted_by_the_surgery() -> None:
    module, seen = net(), []

    def surgery(gram: torch.Tensor) -> torch.Tensor:
        seen.append(gram)
        return torch.tensor([2.0, -1.0])

    terms = TermGradients(surgery)
    data = torch.randn(2, 4, 3, dtype=torch.float64)
    for x in data:
        terms.accumulate(losses(module, x), list(module.parameters()))
    terms.write_(list(module.parameters()))
    parts = [sum(losses(module, x)[k] for x in data) for k in range(2)]
    rows = [torch.autograd.grad(p, list(module.parameters()), allow_unused=True, materialize_grads=True) for p in parts]
    shared = {id(p) for p in module[0].parameters()}  # the second layer is reached by the first term alone
    for parameter, one, two in zip(module.parameters(), *rows, strict=True):
        expected = 2 * one - two if id(parameter) in shared else one
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)
    flat = torch.stack([torch.cat([g.reshape(-1) for g in row[: len(shared)]]) for row in rows])
    torch.testing.assert_close(seen[0], flat @ flat.T, rtol=1e-12, atol=1e-12)
    assert terms.state() is None


def test_what_no_term_reaches_keeps_no_gradient() -> None:
    module = net()
    terms = TermGradients(lambda gram: torch.ones(1))
    terms.accumulate([module[0](torch.ones(1, 3, dtype=torch.float64)).sum()], list(module.parameters()))
    terms.write_(list(module.parameters()))
    assert module[1].weight.grad is None and module[0].weight.grad is not None


def test_the_state_of_half_a_window_goes_on() -> None:
    module = net()
    whole, first, second = (TermGradients(lambda gram: torch.ones(2)) for _ in range(3))
    data, grads = torch.randn(2, 4, 3, dtype=torch.float64), []
    for x in data:
        whole.accumulate(losses(module, x), list(module.parameters()))
    first.accumulate(losses(module, data[0]), list(module.parameters()))
    second.load(first.state(), torch.device("cpu"))
    second.accumulate(losses(module, data[1]), list(module.parameters()))
    for terms in (whole, second):
        terms.write_(list(module.parameters()))
        grads.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_audit_names_what_breaks_the_rule() -> None:
    module = net()
    with pytest.raises(Refusal, match=r"4 trainable parameters got no gradient .*: 0\.weight"):
        audit(module, set())
    module(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    audit(module, set())
    module[1].bias.grad = None
    audit(module, {"1.bias"})
    module[0].weight.requires_grad_(False)
    with pytest.raises(Refusal, match=r"1 frozen parameters got a gradient: 0\.weight"):
        audit(module, {"1.bias"})


def test_scale_multiplies_every_gradient_in_place() -> None:
    module = net()
    module(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    scale_(module.parameters(), 0.25)
    assert all(torch.equal(p.grad, 0.25 * b) for p, b in zip(module.parameters(), before, strict=True))
