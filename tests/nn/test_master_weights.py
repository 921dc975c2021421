"""Float32 masters inside a bfloat16 model: gradients, names, ties, deep copies, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_ft.nn.master_weights import MasterWeights, cast_in_forward, casts, remove_cast
from tests.tolerances import TOL


class Norm(nn.Module):
    """Like Llama's: the weight multiplies what has the input's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return self.weight * (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(11, 6), Norm(), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.linear(self.embed(ids))))


def nets() -> tuple[Net, Net, Net]:
    """One net in float64, one all bfloat16, one with masters that hold what bfloat16 cannot."""
    torch.manual_seed(0)
    exact = Net().double()
    masters = copy.deepcopy(exact).float()
    for module in masters.modules():
        if list(module.parameters(recurse=False)):
            cast_in_forward(module, torch.bfloat16)
    return exact, copy.deepcopy(exact).bfloat16(), masters


IDS = torch.arange(11)


def test_computes_in_bfloat16_and_trains_in_float32() -> None:
    """The output is bit-equal to a bfloat16 model's; gradients arrive at the float32 masters."""
    exact, low, masters = nets()
    out = masters(IDS)
    assert out.dtype == torch.bfloat16 and out.equal(low(IDS))
    weight = torch.randn(11, 11)
    (out.float() * weight).sum().backward()
    (exact(IDS) * weight).sum().backward()
    for (name, p), q in zip(masters.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
        scale = q.grad.abs().max()
        torch.testing.assert_close(p.grad.double() / scale, q.grad / scale, atol=TOL[torch.bfloat16] * 2, rtol=0)


def test_small_steps_are_not_lost() -> None:
    """What bfloat16 would round away adds up in the master."""
    linear = nn.Linear(4, 4)
    cast_in_forward(linear, torch.bfloat16)
    before = linear.weight.detach().clone()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-7)
    linear(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert not linear.weight.equal(before) and linear.weight.bfloat16().equal(before.bfloat16())


def test_names_identity_and_types_stay() -> None:
    """Nothing that a checkpoint, an optimizer or another technique looks at has changed."""
    plain, (_, _, masters) = Net(), nets()
    assert list(plain.state_dict()) == list(masters.state_dict())
    assert masters.head.weight is masters.embed.weight
    assert [name for name, _ in masters.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(masters.linear, nn.Linear) and type(masters.linear).__name__ == "Linear" and casts(masters.linear)
    masters(IDS)
    assert all(isinstance(p, nn.Parameter) for m in masters.modules() for p in m._parameters.values() if p is not None)


def test_a_deep_copy_runs_on_its_own_weights() -> None:
    """A teacher copied from the model does not follow it."""
    _, _, masters = nets()
    teacher = copy.deepcopy(masters)
    before = teacher(IDS)
    with torch.no_grad():
        for p in masters.parameters():
            p.zero_()
    assert teacher(IDS).equal(before) and not masters(IDS).any()


def test_gradient_checkpointing() -> None:
    """Recomputation gives the same gradient."""
    _, _, masters = nets()
    x = torch.randn(3, 6).bfloat16().requires_grad_()
    (plain,) = torch.autograd.grad(masters.linear(x).sum(), masters.linear.weight)
    (again,) = torch.autograd.grad(checkpoint(masters.linear, x, use_reentrant=False).sum(), masters.linear.weight)
    assert plain.equal(again)


def test_restored_after_an_error() -> None:
    """An exception in the forward leaves the masters in place."""
    _, _, masters = nets()
    with pytest.raises(RuntimeError):
        masters.linear(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert masters.linear.weight.dtype == torch.float32 and isinstance(masters.linear.weight, nn.Parameter)


def test_removal() -> None:
    """Undone, it is the layer it was; twice installed is once installed."""
    linear = nn.Linear(4, 4)
    cast_in_forward(linear, torch.float16)
    cast_in_forward(linear, torch.bfloat16)
    assert type(linear).__mro__.count(MasterWeights) == 1
    assert linear(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    remove_cast(linear)
    remove_cast(linear)
    assert type(linear) is nn.Linear and linear(torch.ones(1, 4)).dtype == torch.float32
    assert "_master_compute_dtype" not in vars(linear)
