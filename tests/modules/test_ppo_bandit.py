"""PPO finds what is known to be best: the arms of a bandit of three states, and with a KL the policy that is optimal for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft import PPO
from tests.contract.subjects import trainer
from tests.modules import bandit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bandit.write(tmp_path_factory.mktemp("bandit"))


class Before(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.policy = bandit.policy(pl_module)


def play(place: Path, folder: Path, rounds: int, **model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy after so many rounds of 192 answers, and before."""
    given = {
        "rewards": {"pay": bandit.pay},
        "samples": 4,
        "max_new_tokens": 1,
        "lr": 0.02,
        "beta": 0.0,
        "value_lr": 0.02,
    }
    given |= {"base_dtype": "float32", "warmup_steps": 0, "schedule": "linear"}
    module, before = PPO(str(place / "model"), **{**given, **model}), Before()
    made = trainer(folder, before, max_steps=-1, max_epochs=rounds, limit_val_batches=0)
    made.fit(module, bandit.data(place, batch_size=96, passes=2))
    return bandit.policy(module), before.policy


def test_the_best_arms_are_found(place: Path, tmp_path: Path) -> None:
    found, before = play(place, tmp_path, 14)
    best = bandit.optimum()
    assert (bandit.worth(before) < 0.4 * best).all(), "already good"
    assert (bandit.worth(found) > 0.98 * best).all(), bandit.worth(found)


BETA = 0.5
WITH_KL: dict[str, Any] = {"beta": BETA, "lam": 1.0, "whiten_advantages": False, "lr": 0.02, "value_lr": 0.05}


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_with_a_kl_the_optimum_lies_between(place: Path, tmp_path: Path, kl: str) -> None:
    """Where expected reward less beta KL(p || q) is greatest: q exp(reward / beta), whose worth is known."""
    found, before = play(place, tmp_path, 16, kl=kl, **WITH_KL)
    best = bandit.optimum(before, BETA)
    greedy = torch.full_like(found, -30).scatter(1, bandit.table().argmax(1, keepdim=True), 0)
    for other in (greedy, before):
        assert (bandit.worth(other, before, BETA) < 0.9 * best).all(), "the KL changes nothing"
    assert (bandit.worth(found, before, BETA) > 0.98 * best).all(), bandit.worth(found, before, BETA) / best


def test_with_k3_alone_in_the_loss_it_is_the_kl_the_other_way_round(place: Path, tmp_path: Path) -> None:
    found, before = play(place, tmp_path, 16, kl="loss", correct_kl=False, **WITH_KL)
    best = bandit.worth_by_forward_kl(bandit.optimum_by_forward_kl(before, BETA), before, BETA)
    assert (bandit.worth_by_forward_kl(before, before, BETA) < 0.9 * best).all()
    worth = bandit.worth_by_forward_kl(found, before, BETA)
    assert (worth > 0.98 * best).all(), worth / best
    assert (worth <= best + 1e-9).all(), "no policy is better than the best"
