"""PPO's advantages and losses against loops written from the papers, in float64; what masks, ranks and single tokens do to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.functional.policy_gradient import Clip
from lightning_ft.objectives.ppo import Appraisal, Settings, appraised, measured, terms

# Answers 0 to 4, of which 2 is not kept; 1 and 4 were cut.
LENGTHS, KEPT, ENDED = (4, 1, 7, 2, 3), (True, True, False, True, True), (True, False, True, True, False)
OWNER = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS) * torch.tensor(KEPT))
N = len(OWNER)


def drawn(seed: int, count: int = N) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SCORES, VALUES, LOGP, OLD, REFERENCE = drawn(0, 5), drawn(1), drawn(2) - 3, drawn(3) - 3, drawn(4) - 3


def by_hand(how: Appraisal, beta: float) -> tuple[list[float], list[float]]:
    """One answer after another, with lists; whitening at the end of each stage over all tokens."""
    rows: list[tuple[list[float], list[float]]] = []
    at = 0
    for answer, length in enumerate(LENGTHS):
        if not KEPT[answer]:
            continue
        rewards = [-beta * float(OLD[t] - REFERENCE[t]) for t in range(at, at + length)]
        rewards[-1] += float(SCORES[answer]) - (0.0 if ENDED[answer] else how.missing_end_penalty)
        rows.append((rewards, [float(VALUES[t]) for t in range(at, at + length)]))
        at += length
    every = [r for rewards, _ in rows for r in rewards]
    mean = sum(every) / len(every)
    variance = sum((r - mean) ** 2 for r in every) / len(every)  # biased
    advantages, returns = [], []
    for rewards, values in rows:
        if how.whiten_rewards:
            rewards = [(r - mean) / math.sqrt(variance + 1e-8) + mean for r in rewards]
        following = [*values[1:], 0.0]
        deltas = [r + how.gamma * f - v for r, f, v in zip(rewards, following, values, strict=True)]
        for t in range(len(deltas)):
            found = sum((how.gamma * how.lam) ** k * d for k, d in enumerate(deltas[t:]))
            advantages.append(found)
            returns.append(found + values[t])
    if how.whiten_advantages:
        mean = sum(advantages) / N
        variance = sum((a - mean) ** 2 for a in advantages) / N
        advantages = [(a - mean) / math.sqrt(variance + 1e-8) for a in advantages]
    return advantages, returns


@pytest.mark.parametrize(
    "how",
    [
        Appraisal(),
        Appraisal(gamma=0.9, lam=0.7, missing_end_penalty=1.5),
        Appraisal(whiten_rewards=True),
        Appraisal(1.0, 1.0, 0.5, whiten_rewards=True, whiten_advantages=False),
    ],
    ids=["default", "penalty", "whitened rewards", "nothing centred"],
)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_against_loops(how: Appraisal, beta: float) -> None:
    kl = OLD - REFERENCE if beta else None
    advantages, returns = appraised(SCORES, torch.tensor(ENDED), OWNER, VALUES, kl, beta, how)
    expected = by_hand(how, beta)
    torch.testing.assert_close(advantages, torch.tensor(expected[0], dtype=torch.float64))
    torch.testing.assert_close(returns, torch.tensor(expected[1], dtype=torch.float64))


def test_the_score_of_an_answer_that_is_not_kept_reaches_nothing() -> None:
    other = SCORES.clone()
    other[2] = math.nan
    first = appraised(SCORES, torch.tensor(ENDED), OWNER, VALUES, None, 0.0, Appraisal())
    second = appraised(other, torch.tensor(ENDED), OWNER, VALUES, None, 0.0, Appraisal())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("count", [0, 1])
def test_of_one_token_and_of_none(count: int) -> None:
    owner = torch.zeros(count, dtype=torch.long)
    how = Appraisal(whiten_rewards=True)
    advantages, returns = appraised(
        torch.ones(1), torch.tensor([True]), owner, torch.zeros(count), torch.zeros(count), 0.1, how
    )
    assert advantages.shape == returns.shape == (count,) and advantages.isfinite().all()


def batch(logp: Tensor) -> Batch:
    columns = {
        "advantages": drawn(5),
        "returns": drawn(6),
        "old_logps": OLD,
        "old_values": VALUES,
        "reference_logps": REFERENCE,
    }
    whole = torch.arange(N)
    return Batch(
        ids=whole[None], positions=whole[None], bounds=(0, N), mask=None, scored=whole, labels=whole,
        segment_of_scored=OWNER, rows=torch.arange(5), counts={"token": float(N), "row": 5.0}, columns=columns,
    )  # fmt: skip


@pytest.mark.parametrize("value_clip", [None, 0.3])
@pytest.mark.parametrize(
    ("kl_weight", "entropy_weight", "correct"), [(0.0, 0.0, True), (0.2, 0.05, True), (0.2, 0.05, False)]
)
def test_losses_against_loops(value_clip: float | None, kl_weight: float, entropy_weight: float, correct: bool) -> None:
    logp, values, entropy = (x.clone().requires_grad_() for x in (LOGP, drawn(7), drawn(8).abs()))
    settings = Settings(Clip(0.2, 0.3), value_clip, 0.1, entropy_weight, correct)
    made = batch(logp)
    found = terms(made, logp, values, entropy, settings, kl_weight)
    total = sum(term.weight * term.sum for term in found)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(N):
        rho = torch.exp(logp[t] - OLD[t])
        advantage, target, old = (float(made.columns[name][t]) for name in ("advantages", "returns", "old_values"))
        expected = expected - min(rho * advantage, min(max(rho, rho.new_tensor(0.8)), rho.new_tensor(1.3)) * advantage)
        error = (values[t] - target) ** 2
        if value_clip is not None:
            inside = min(max(values[t], values.new_tensor(old - value_clip)), values.new_tensor(old + value_clip))
            error = max(error, (inside - target) ** 2)
        expected = expected + 0.1 * 0.5 * error
        difference = REFERENCE[t] - logp[t]
        kl = (rho if correct else 1) * (torch.exp(difference) - 1 - difference)
        expected = expected + kl_weight * kl - entropy_weight * entropy[t]
    torch.testing.assert_close(total, expected)
    assert all(term.count == N and term.unit == "token" for term in found)
    assert [term.name for term in found] == ["policy", "value", *(["kl_loss", "entropy_bonus"] if kl_weight else [])]
    leaves = [logp, values, *([entropy] if entropy_weight else [])]
    for ours, theirs in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_logged_counts_scored_tokens_only() -> None:
    values, entropy = drawn(7), drawn(8)
    found = {
        k: float(v) / n
        for k, (v, n) in measured(batch(LOGP), LOGP, values, entropy, Settings(Clip(), 0.3, 0.1, 0)).items()
    }
    ratio, advantages = [math.exp(float(d)) for d in LOGP - OLD], drawn(5).tolist()
    expected = {
        "entropy": float(entropy.mean()),
        "ratio": sum(ratio) / N,
        "clipped_low": sum(r < 0.8 and a < 0 for r, a in zip(ratio, advantages, strict=True)) / N,
        "clipped_high": sum(r > 1.2 and a > 0 for r, a in zip(ratio, advantages, strict=True)) / N,
        "clipped_values": sum(abs(float(v - o)) > 0.3 for v, o in zip(values, VALUES, strict=True)) / N,
        "policy_kl": sum(r - 1 - math.log(r) for r in ratio) / N,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["clipped_low"] > 0 and expected["clipped_high"] > 0


def test_an_unmoved_policy() -> None:
    made = batch(OLD)
    found = measured(made, OLD, VALUES, drawn(8), Settings(Clip(), 0.3, 0.1, 0))
    still = {name: float(value) / count for name, (value, count) in found.items() if name != "entropy"}
    assert still == {"ratio": 1.0, "clipped_low": 0.0, "clipped_high": 0.0, "clipped_values": 0.0, "policy_kl": 0.0}


@pytest.mark.parametrize("correct", [True, False])
def test_whose_gradient_a_kl_in_the_loss_has(correct: bool) -> None:
    """Over all tokens of a vocabulary, weighted as they are drawn: KL(p || q) where it is corrected, else KL(q || p)."""
    z, logq = drawn(9, 12).requires_grad_(), drawn(10, 12).log_softmax(-1)
    logp = z.log_softmax(-1)
    p = logp.detach().exp()
    settings, none = Settings(Clip(), None, 1.0, 0.0, correct), torch.zeros(1)
    each = []
    for v in range(12):
        here = slice(v, v + 1)
        each.append(terms(one(logp[here], logq[here]), logp[here], none, none, settings, 1.0))
    loss = sum(weight * found[2].sum for weight, found in zip(p, each, strict=True))
    kl = (logp.exp() * (logp - logq)).sum() if correct else (logq.exp() * (logq - logp)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, z, retain_graph=True)[0], torch.autograd.grad(kl, z)[0])


def one(logp: Tensor, reference: Tensor) -> Batch:
    """A batch of one token, drawn by the policy as it is."""
    none, at = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    columns = {
        "advantages": none,
        "returns": none,
        "old_values": none,
        "old_logps": logp.detach(),
        "reference_logps": reference,
    }
    counts = {"token": 1.0, "row": 1.0}
    return Batch(at[None], at[None], (0, 1), None, at, at, at, at, counts, columns=columns)
