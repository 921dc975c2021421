"""Steps of an inner loop beside torch's own optimizers, of an embedding of which each step holds other rows."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_ft.functional.inner_optimizers import descend
from lightning_ft.nn.sparse_embeddings import sparse_embeddings
from tests.tolerances import TOL

ROWS = [[1, 2, 2], [3, 1, 4], [4, 4, 5], [2, 5, 1], [1, 2, 3]]
"""That each step looks up: some twice, and some again after others."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(7, 3, dtype=torch.float64)
        self.out = nn.Linear(3, 1, dtype=torch.float64)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype))

    def forward(self, rows):
        return self.out(torch.tanh(self.table(rows))).square().mean()


def with_torch(optimizer):
    """The weights after each step."""
    net = Net()
    if optimizer == "sgd":
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
    else:
        inner = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.0, 0.999))
    for rows in ROWS:
        inner.zero_grad()
        net(torch.tensor(rows)).backward()
        inner.step()
        yield {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("sparse", [(0, 1, 2, 3, 4), (), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_steps_of_torchs_own(optimizer, sparse):
    """However many of them see a sparse gradient."""
    net = Net()
    theta = dict(net.named_parameters())
    before = {name: p.detach().clone() for name, p in theta.items()}

    def slopes(step, weights):
        at = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with sparse_embeddings(net) if step in sparse else nullcontext():
            loss = torch.func.functional_call(net, at, (torch.tensor(ROWS[step]),))
        found = dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))
        assert found["table.weight"].is_sparse == (step in sparse)
        return found

    start, *steps = (
        {name: weight.clone() for name, weight in weights.items()}
        for weights in descend(slopes, theta, lr=0.1, steps=len(ROWS), optimizer=optimizer)
    )
    for found, expected in zip(steps, with_torch(optimizer), strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=TOL[torch.float64], atol=TOL[torch.float64], msg=name)
    for name, value in before.items():
        assert torch.equal(start[name], value) and torch.equal(theta[name], value), "the start stays as it is"
    assert torch.equal(steps[-1]["table.weight"][[0, 6]], before["table.weight"][[0, 6]]), "rows that nobody looked up"


def test_embeddings_are_sparse_within_alone():
    net = nn.ModuleList(
        [nn.Embedding(3, 2), nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2, scale_grad_by_freq=True)]
    )
    with pytest.raises(ZeroDivisionError), sparse_embeddings(net):
        assert [part.sparse for part in net] == [True, True, False]
        raise ZeroDivisionError
    assert [part.sparse for part in net] == [False, True, False]


def test_that_of_a_tied_head_stays_dense():
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    net[1].weight = net[0].weight

    def gradient():
        return torch.autograd.grad(net(torch.tensor(ROWS[0])).square().mean(), net[0].weight)[0]

    expected = gradient()
    with sparse_embeddings(net):
        found = gradient()
    assert not found.is_sparse
    torch.testing.assert_close(found, expected)
