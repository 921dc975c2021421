"""Nets that drop at random when they train: what depends on their mode rests, what does not is refused."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_ft import EpisodeData, ProtoNet, Refusal
from lightning_ft.engine.answers import no_dropout
from tests.contract.subjects import trainer
from tests.modules.episodes import fit, mlp, module, sines


class Dropping(nn.Module):
    """The small net with dropout that no layer of torch's own does."""

    def __init__(self, always=False):
        super().__init__()
        self.inner, self.always, self.rate = mlp(), always, 0.05 if always else 0.5

    def forward(self, x):
        h = self.inner[1](self.inner[0](x))
        h = F.dropout(h, self.rate, self.always or self.training)
        return self.inner[4](self.inner[3](self.inner[2](h)))


class Twice(Callback):
    """How far two passes over the support rows of a step differ."""

    def __init__(self):
        self.away = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        x = batch.episodes()[0].support.inputs
        with torch.no_grad():
            self.away.append(float((pl_module(x) - pl_module(x)).abs().max()))


@pytest.mark.parametrize("model", [{}, {"tasks": "one_by_one"}, {"tasks": "one_by_one", "order": 1}], ids=str)
def test_dropout_by_mode_is_off(tmp_path, model):
    """The step is that of the net without dropout, and the net's mode stays."""
    twice, net = Twice(), Dropping()
    steps, _ = fit(tmp_path, module(net=net, **model), sines(), twice, max_steps=1)
    plain, _ = fit(tmp_path, module(**model), sines(), max_steps=1)
    assert twice.away == [0.0] and steps.losses == plain.losses
    for name, gradient in plain.gradients[0].items():
        torch.testing.assert_close(steps.gradients[0][name.replace("model.", "model.inner.")], gradient)
    assert all(part.training for part in net.modules())


@pytest.mark.parametrize("kind", ["MAML", "Reptile"])
def test_dropout_in_every_mode_is_refused(tmp_path, kind):
    said = f"{kind} takes several passes over one row, which must be of one function, and two of them differ by up to"
    torch.manual_seed(0)  # with 24 units and a rate of 0.05 one pair of passes in twelve drops nothing
    with pytest.raises(Refusal, match=said):
        fit(tmp_path, module(kind, net=Dropping(always=True)), sines())
    torch.manual_seed(0)
    with pytest.raises(Refusal, match=said):
        made = module(kind, net=Dropping(always=True))
        trainer(tmp_path, limit_val_batches=1).validate(made, sines(), verbose=False)


def test_norms_keep_their_mode(tmp_path):
    """Statistics of the batch, as without a net's evaluation mode."""
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
    made = module(net=net, tasks="one_by_one")
    modes = []
    net[1].register_forward_pre_hook(lambda part, _: modes.append((part.training, net[2].training)))
    fit(tmp_path, made, sines(), max_steps=1)
    assert set(modes) == {(True, False)} and net[1].training and net[2].training


def test_the_trial_writes_no_statistics(tmp_path):
    """A prototypical net may have running statistics: each training pass counts once."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    made = ProtoNet(net=net, lr=0.1)
    data = EpisodeData(tasks=f"{__name__}.two_classes", batch_size=2, episodes=2)
    fit(tmp_path, made, data, max_steps=1)
    assert int(net[1].num_batches_tracked) == 4  # support and query of two tasks


def two_classes(rng, count):
    x, y = rng.normal(size=(count, 4, 2)), [[0, 1, 0, 1]] * count
    return x, y, x, y


def test_numbers_that_drop_by_other_names():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layerdrop, self.resid_pdrop, self.router_jitter_noise, self.attention_dropout = 0.05, 0.1, 0.01, 0.1
            self.scale = 0.5

    net = nn.Sequential(Part(), nn.Dropout(0.1))
    no_dropout(net)
    part = net[0]
    assert (part.layerdrop, part.resid_pdrop, part.router_jitter_noise, part.attention_dropout) == (0.0,) * 4
    assert part.scale == 0.5 and net[1].p == 0.0
