"""torchrl as oracle of PPO: the same advantages of whole answers, and the same losses and gradients of a policy and its critic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ft.engine.batch import Batch
from lightning_ft.functional.advantages import generalised_advantages
from lightning_ft.functional.policy_gradient import Clip
from lightning_ft.objectives.ppo import Settings, terms

pytest.importorskip("torchrl")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchrl and tensordict warn about what is not used here

KEPT_IN_FLOAT32 = {"rtol": 1e-6, "atol": 1e-8}
"""torchrl keeps the weights of its losses in float32."""
LENGTHS = (4, 1, 7, 2)
OWNER = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
N, WIDTH, WORDS = len(OWNER), 3, 5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (N,)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0)])
def test_generalised_advantages(gamma: float, lam: float) -> None:
    """There answers lie end to end on one axis of time, each closed by its last token."""
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    rewards, values = drawn(0), drawn(1)
    last = torch.cat([OWNER[1:] != OWNER[:-1], torch.tensor([True])])
    following = torch.where(last, 0.0, values.roll(-1))
    theirs = generalized_advantage_estimate(
        gamma, lam, *(x[:, None] for x in (values, following, rewards)), done=last[:, None], terminated=last[:, None]
    )
    ours = generalised_advantages(rewards, values, OWNER, gamma=gamma, lam=lam)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other[:, 0])


class Pair(nn.Module):
    """A policy and a critic, linear in what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.critic = nn.Linear(WIDTH, WORDS).double(), nn.Linear(WIDTH, 1).double()
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = drawn(20 + seed, *parameter.shape)


SEEN, TAKEN = drawn(2, N, WIDTH), torch.randint(WORDS, (N,), generator=torch.Generator().manual_seed(3))
OLD_LOGPS, OLD_VALUES, ADVANTAGES, RETURNS = drawn(4) - 1.5, drawn(5), drawn(6), drawn(7)


def ours(pair: Pair, settings: Settings) -> list[Tensor]:
    columns = {"advantages": ADVANTAGES, "returns": RETURNS, "old_logps": OLD_LOGPS, "old_values": OLD_VALUES}
    at = torch.arange(N)
    batch = Batch(
        ids=at[None], positions=at[None], bounds=(0, N), mask=None, scored=at, labels=TAKEN,
        segment_of_scored=OWNER, rows=torch.arange(len(LENGTHS)), counts={"token": float(N), "row": 4.0}, columns=columns,
    )  # fmt: skip
    logps = pair.policy(SEEN).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    found = terms(batch, logps.gather(-1, TAKEN[:, None])[:, 0], pair.critic(SEEN)[:, 0], entropy, settings)
    return [term.weight * term.sum / term.count for term in found]


def theirs(pair: Pair, settings: Settings) -> list[Tensor]:
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss

    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(pair.policy, in_keys=["seen"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical
        ),
    )
    loss = ClipPPOLoss(
        policy,
        TensorDictModule(pair.critic, in_keys=["seen"], out_keys=["state_value"]),
        clip_epsilon=settings.clip.low,
        entropy_coeff=settings.entropy_weight,
        critic_coeff=settings.value_weight / 2,  # theirs is the whole squared error
        loss_critic_type="l2",
        clip_value=settings.value_clip,
        normalize_advantage=False,
        functional=False,
    )
    columns = {
        "advantage": ADVANTAGES, "value_target": RETURNS, "action_log_prob": OLD_LOGPS, "state_value": OLD_VALUES
    }  # fmt: skip
    rows = TensorDict({"seen": SEEN, "action": TAKEN} | {k: v[:, None] for k, v in columns.items()}, [N])
    rows["action_log_prob"] = OLD_LOGPS
    found = loss(rows)
    return [found["loss_objective"], found["loss_critic"], found["loss_entropy"]]


@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_losses_and_gradients(value_clip: float | None) -> None:
    settings = Settings(Clip(0.2, 0.2), value_clip, value_weight=0.1, entropy_weight=0.05)
    pair = Pair()
    weights = list(pair.parameters())
    for mine, other in zip(ours(pair, settings), theirs(pair, settings), strict=True):
        torch.testing.assert_close(mine, other)
        ours_slope, their_slope = (
            torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (mine, other)
        )
        assert any(slope is not None and slope.abs().max() > 1e-3 for slope in their_slope)
        for here, there in zip(ours_slope, their_slope, strict=True):
            assert (here is None) == (there is None)
            if here is not None:
                torch.testing.assert_close(here, there, **KEPT_IN_FLOAT32)
