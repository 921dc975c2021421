"""MAS: the contract, and importances against a loop over examples."""

import copy

import pytest
import torch
from torch import nn

from lightning_ft import MAS
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, fit, rows
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
