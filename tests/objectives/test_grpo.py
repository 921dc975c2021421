"""Terms of a micro-batch of answers against loops in float64, written from the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_ft.data.rollouts.collate import Rollout, collate_rollouts
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.policy_gradient import Clip
from lightning_ft.objectives.grpo import Settings, measured, terms
from tests.tolerances import TOL

LONGEST = 9
LENGTHS = (1, 4, 7, 2)


def batch() -> tuple[Batch, torch.Tensor]:
    """Four answers of uneven length, and log-probabilities on both sides of the clip."""
    import numpy as np

    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for number, length in enumerate(LENGTHS):
        tokens = {
            "old_logps": -3 * torch.rand(length, generator=generator, dtype=torch.float64),
            "reference_logps": -3 * torch.rand(length, generator=generator, dtype=torch.float64),
            "advantages": torch.full((length,), [1.2, -0.7, 0.4, -1.5][number], dtype=torch.float64),
        }
        answer = np.arange(10, 10 + length)
        rollouts.append(Rollout(np.array([1, 2, 3]), answer, number // 2, number // 2, tokens))
    made = collate_rollouts(rollouts, ["advantages", "old_logps", "reference_logps"], packed=True, shared=True)
    made.columns = {name: value.double() for name, value in made.columns.items()}
    logp = made.columns["old_logps"] + 0.5 * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    return made, logp


def by_hand(made: Batch, logp: torch.Tensor, s: Settings) -> dict[str, float]:
    """The sums of each term, token by token."""
    old, reference, advantages = (made.columns[n].tolist() for n in ("old_logps", "reference_logps", "advantages"))
    now, sums, at = logp.tolist(), {"policy": 0.0, "kl_loss": 0.0}, 0
    for length in LENGTHS:
        mean = sum(now[t] - old[t] for t in range(at, at + length)) / length
        policy, kl = [], []
        for t in range(at, at + length):
            rho = math.exp(mean if s.importance == "sequence" else now[t] - old[t])
            if s.loss == "cispo":
                policy.append(-min(rho, s.cispo_most) * advantages[t] * now[t])
            else:
                inside = min(max(rho, 1 - s.clip.low), 1 + s.clip.high)
                outside = rho if s.clip.both is None else min(rho, s.clip.both)
                policy.append(-min(outside * advantages[t], inside * advantages[t]))
            difference = reference[t] - now[t]
            kl.append((math.exp(difference) - difference - 1) * (rho if s.correct_kl else 1.0))
        for name, values in (("policy", policy), ("kl_loss", kl)):
            divisor = {"grpo": length, "dr_grpo": LONGEST}.get(s.loss, 1)
            sums[name] += sum(values) / divisor
        at += length
    return sums


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("clip", [Clip(), Clip(0.1, 0.28, 1.4)], ids=["even", "both"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_terms(loss: Any, importance: Any, clip: Clip, beta: float) -> None:
    made, logp = batch()
    settings = Settings(loss, importance, clip, 1.3, beta, beta > 0.1 and importance == "token", LONGEST)
    expected = by_hand(made, logp, settings)
    found = terms(made, logp, settings)
    assert [term.name for term in found] == ["policy", "kl_loss"][: 1 + (beta > 0)]
    for term in found:
        assert float(term.sum) == pytest.approx(expected[term.name], abs=TOL[torch.float64])
        assert term.unit == ("row" if loss in ("grpo", "dr_grpo") else "token")
        assert term.count == (len(LENGTHS) if term.unit == "row" else sum(LENGTHS))
    assert [term.weight for term in found] == [1.0, beta][: len(found)]


@pytest.mark.parametrize("loss", ["grpo", "cispo"])
def test_gradients(loss: Any) -> None:
    """Central differences of the loops; where cispo holds its weights constant, those of its formula."""
    made, logp = batch()
    settings = Settings(loss, "token", Clip(0.1, 0.28, 1.4), 1.3, 0.3, True, LONGEST)
    leaf = logp.clone().requires_grad_()
    sum(term.weight * term.sum for term in terms(made, leaf, settings)).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    for t in range(len(logp)):
        step = torch.zeros_like(logp)
        step[t] = 1e-6
        up, down = (by_hand(made, logp + sign * step, settings) for sign in (1, -1))
        expected = 0.3 * (up["kl_loss"] - down["kl_loss"]) / 2e-6
        if loss == "cispo":
            rho = math.exp(float(logp[t] - made.columns["old_logps"][t]))
            expected += -min(rho, 1.3) * float(made.columns["advantages"][t])
        else:
            expected += (up["policy"] - down["policy"]) / 2e-6
        assert float(leaf.grad[t]) == pytest.approx(expected, abs=1e-6)


def test_in_a_round_of_one_step_the_old_policy_is_the_present_one() -> None:
    made, logp = batch()
    settings = Settings("dapo", "token", Clip(), 5.0, 0.0, True, LONGEST)
    del made.columns["old_logps"]
    leaf = logp.clone().requires_grad_()
    (term,) = terms(made, leaf, settings)
    term.sum.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, -made.columns["advantages"])
    found = measured(made, leaf, torch.ones_like(logp), settings)
    assert {name: float(value) / count for name, (value, count) in found.items()} == {
        "entropy": 1.0,
        "ratio": 1.0,
        "clipped_low": 0.0,
        "clipped_high": 0.0,
        "policy_kl": 0.0,
    }


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_what_is_measured(loss: Any) -> None:
    made, logp = batch()
    settings = Settings(loss, "token", Clip(0.1, 0.3), 1.3, 0.0, True, LONGEST)
    found = {name: float(value) / count for name, (value, count) in measured(made, logp, logp * 0, settings).items()}
    ratios = [math.exp(a - b) for a, b in zip(logp.tolist(), made.columns["old_logps"].tolist(), strict=True)]
    pairs = list(zip(ratios, made.columns["advantages"].tolist(), strict=True))
    low = sum(r < 0.9 and a < 0 for r, a in pairs) / len(pairs) if loss == "dapo" else 0.0
    high = sum(r > 1.3 and (a > 0 or loss == "cispo") for r, a in pairs) / len(pairs)
    assert found["ratio"] == pytest.approx(sum(ratios) / len(ratios))
    assert found["clipped_low"] == pytest.approx(low) and found["clipped_high"] == pytest.approx(high) and high > 0
    assert found["policy_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / len(ratios))
