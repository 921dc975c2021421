"""TRL's RewardTrainer as an oracle: its loss and accuracy of the same rewards, with and without margins and centring."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_ft.engine.batch import Batch
from lightning_ft.objectives import reward

pytestmark = pytest.mark.filterwarnings("ignore")
P = 7


def trl_loss(chosen, rejected, margin, coefficient):
    """(loss, accuracy, margin) as `RewardTrainer.compute_loss` finds them; its rows are all chosen, then all rejected."""
    from trl import RewardTrainer

    def gather(x):
        return x

    me = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * P, 3), **({"margin": margin} if margin is not None else {})}
    loss = RewardTrainer.compute_loss(
        me, lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None]), inputs
    )
    return loss, me._metrics["train"]["accuracy"][0], me._metrics["train"]["margin"][0]


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_and_what_is_logged_are_trls(with_margin, coefficient):
    generator = torch.Generator().manual_seed(3)
    rewards = (2 * torch.randn(2 * P, generator=generator, dtype=torch.float64)).requires_grad_()
    margin = torch.rand(P, generator=generator, dtype=torch.float64) if with_margin else None
    empty = torch.zeros(1, 0, dtype=torch.int64)
    columns = {} if margin is None else {"margin": margin}
    batch = Batch(empty, empty, None, None, empty, empty, empty, empty, {"pair": P}, columns=columns)
    chosen, rejected = reward.pairs(batch, rewards)
    ours = sum(t.weight * t.sum / t.count for t in reward.terms(batch, chosen, rejected, coefficient))
    measured = {name: float(value / count) for name, (value, count) in reward.measured(chosen, rejected).items()}
    theirs, accuracy, ahead = trl_loss(rewards[0::2], rewards[1::2], margin, coefficient)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rewards)[0] for loss in (ours, theirs)), rtol=1e-12, atol=0)
    assert measured["accuracy"] == pytest.approx(accuracy)
    assert measured["rewards/margins"] == pytest.approx(ahead)
