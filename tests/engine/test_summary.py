"""What a run says of its memory beforehand is what optimizers and checkpoints then hold."""

import re
from functools import partial

import pytest
import torch

from lightning_ft.engine.summary import memory, trained_counts
from tests.modules.episodes import fit, module, sines


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9)], ids=str)
def test_memory(tmp_path, optimizer, monkeypatch):
    made = module(optimizer=optimizer)
    _, runner = fit(tmp_path, made, sines(), max_steps=1)
    weights = sum(p.numel() for p in made.parameters())
    states = runner.optimizers[0].state.values()
    held = sum(value.numel() for state in states for name, value in state.items() if name != "step")
    assert trained_counts(made)[0] == weights and held in {0, weights, 2 * weights}
    monkeypatch.setattr("lightning_ft.engine.summary.MEGA", 1.0)  # a small net's bytes, whole
    said = memory(made, weights)
    taken, written = (int(found.replace(",", "")) for found in re.findall(r"(?:with \D*|checkpoint )([\d,]+) MB", said))
    if isinstance(optimizer, partial):
        assert said.count("and more of the optimizer's") == 2 and "its optimizer" in said
        held = 0
    assert taken == 4 * (2 * weights + held)
    assert written == 4 * (weights + held)
