"""MAS: the contract, and importances against a loop over examples."""

import copy

import pytest
import torch
from torch import nn

from lightning_ft import MAS
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, fit, loader, rows, state
from tests.engine.importances import loop

CASE = Case(MAS, small={"lam": 2.0}, idle={"lam": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


class Noisy(PlainNet):
    """With a dropout, which no measurement may feel."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*self.net[:2], nn.Dropout(0.5), *self.net[2:])


def test_it_is_the_mean_of_absolute_gradients_in_eval_mode(tmp_path):
    """Traps 1 and 4: of each example's, not of a batch's; and without dropout. Labels have no say."""
    net, technique = Noisy(), MAS(2.0)
    fit(tmp_path, net, technique)
    assert net.net[2].training
    measured = technique.state_dict()["next"]["importance"]
    alone = copy.deepcopy(net).double().eval()
    expected = loop(alone, (alone.net(x[None]).square().sum() for x in rows()[0].double()), power=1)
    for name, value in expected.items():
        torch.testing.assert_close(measured[name].double(), value, rtol=1e-4, atol=1e-6)


def test_all_tasks_are_held_around_where_the_last_one_ended(tmp_path):
    """The paper's rule (section 3, equation 4) over three tasks, written out: importances in one sum, one optimum."""
    ours, theirs, technique, lam = PlainNet(), PlainNet(), MAS(0.02), 0.02
    parameters = dict(theirs.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for _ in range(3):
        fit(tmp_path, ours, technique)
        star = {n: p.detach().clone() for n, p in parameters.items()}
        for batch in list(loader())[:3]:
            held = sum((total[n] * (p - star[n]) ** 2).sum() for n, p in parameters.items())
            objective = theirs.training_step(batch, 0) + lam / 2 * held
            grads = torch.autograd.grad(objective, list(parameters.values()))
            for p, grad in zip(parameters.values(), grads, strict=True):
                p.data -= 0.5 * grad
        for x in rows()[0]:
            grads = torch.autograd.grad(theirs.net(x[None]).square().sum(), list(parameters.values()))
            for name, grad in zip(parameters, grads, strict=True):
                total[name] += grad.abs() / 16
        kept = technique.state_dict()["next"]
        for name, p in parameters.items():
            torch.testing.assert_close(kept["importance"][name], total[name], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(kept["center"][name], p.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(state(ours)[name], p.detach(), rtol=1e-4, atol=1e-6)
