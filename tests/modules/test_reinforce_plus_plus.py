"""REINFORCE++ against a loop over tokens in float64, of one answer a prompt and of several; what it does not drop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ft import LoRA
from lightning_ft.engine.rollouts.round import Round
from tests.modules.rollouts import Stir, play, sevens, write_prompts


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("reinforce"))


def by_hand(round: Round, beta: float) -> list[float]:
    """Rewards of tokens, what follows each of them, normalised over the batch's tokens."""
    owner = round.owner.tolist()
    every: list[float] = []
    for answer in sorted(set(owner)):
        at = [n for n, one in enumerate(owner) if one == answer]
        now, before = (round.tokens[name].double()[at].tolist() for name in ("old_logps", "reference_logps"))
        rewards = [-beta * (p - q) for p, q in zip(now, before, strict=True)]
        rewards[-1] += float(round.scores.total[answer])
        every += [sum(rewards[n:]) for n in range(len(rewards))]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [(x - mean) / deviation for x in every]


@pytest.mark.parametrize("samples", [1, 3])
def test_advantages(job: Path, tmp_path: Path, samples: int) -> None:
    settings: dict[str, Any] = {"advantage": "reinforce++", "samples": samples, "beta": 0.3}
    _, watch, made = play(job, tmp_path, LoRA(r=4), Stir(), **settings)
    assert len(watch.rounds) == 2
    for round in watch.rounds:
        found = round.tokens["advantages"].double()
        assert not torch.equal(round.tokens["old_logps"], round.tokens["reference_logps"])
        torch.testing.assert_close(found, torch.tensor(by_hand(round, 0.3), dtype=torch.float64), rtol=1e-5, atol=1e-6)
        assert found.std() > 0.5 and abs(float(found.mean())) < 1e-6
    logged = made.callback_metrics
    assert "train/kl_loss" not in logged and "train/without_signal" not in logged and "train/kl" in logged
    assert watch.gradients[0] and all(bool(gradient.any()) for gradient in watch.gradients[-1].values())


def test_prompts_whose_answers_are_rewarded_alike_still_teach(job: Path, tmp_path: Path) -> None:
    """Each prompt has a reward of its own: groups say nothing, the round does."""

    def by_prompt(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(row) for row in answer]

    taught = {}
    for advantage in ("group", "reinforce++"):
        _, watch, _ = play(job, tmp_path / advantage, LoRA(r=4), rewards={"row": by_prompt}, advantage=advantage)
        assert bool(watch.rounds[0].kept.any()) == (advantage == "reinforce++")
        taught[advantage] = any(bool(gradient.any()) for gradient in watch.gradients[0].values())
    assert taught == {"group": False, "reinforce++": True}


def test_without_a_kl_it_is_the_whitened_reward(job: Path, tmp_path: Path) -> None:
    _, watch, _ = play(job, tmp_path, LoRA(r=4), rewards={"sevens": sevens}, advantage="reinforce++", samples=2)
    round = watch.rounds[0]
    reward = round.scores.total[round.owner]
    expected = (reward - reward.mean()) / (reward.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(round.tokens["advantages"].double(), expected, rtol=1e-5, atol=1e-6)
