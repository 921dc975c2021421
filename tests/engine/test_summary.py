"""What a run says of its memory beforehand is what optimizers and checkpoints then hold."""

from functools import partial

import pytest
import torch

from lightning_ft.engine.summary import memory, memory_bytes, trained_counts
from tests.modules.episodes import fit, module, sines


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9)], ids=str)
def test_memory(tmp_path, optimizer):
    made = module(optimizer=optimizer)
    _, runner = fit(tmp_path, made, sines(), max_steps=1)
    weights = sum(p.numel() for p in made.parameters())
    states = runner.optimizers[0].state.values()
    held = sum(value.numel() for state in states for name, value in state.items() if name != "step")
    assert trained_counts(made)[0] == weights and held in {0, weights, 2 * weights}
    said = memory(made, weights)
    if isinstance(optimizer, partial):
        assert said.count("and more of the optimizer's") == 2 and "its optimizer" in said
        held = 0
    else:
        assert "more" not in said and f"trained with {'AdamW' if optimizer is None else 'SGD'} " in said
    assert memory_bytes(made, weights) == (4 * (2 * weights + held), 4 * (weights + held))
