"""Advantages against loops written from the papers, and against TRL's trainers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_ft.functional.advantages import (
    Moments,
    generalised_advantages,
    group_advantages,
    leave_one_out,
    whiten,
    without_signal,
)

LENGTHS = (4, 1, 7, 2)
OWNER = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_generalised_advantages(gamma: float, lam: float) -> None:
    rewards, values = drawn(14), drawn(1, 14)[0]
    found, returns = generalised_advantages(rewards, values, OWNER, gamma=gamma, lam=lam)
    expected = []
    for answer in range(4):
        r, v = rewards[answer == OWNER].tolist(), [*values[answer == OWNER].tolist(), 0.0]
        for t in range(len(r)):  # the sum itself, not the recursion
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(t, len(r))]
            expected.append(sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(returns, found + values)


def test_with_lambda_1_returns_are_what_was_got() -> None:
    rewards = drawn(14)
    _, returns = generalised_advantages(rewards, drawn(1, 14)[0], OWNER, lam=1.0)
    got = torch.cat([r.flip(0).cumsum(0).flip(0) for r in rewards.split(LENGTHS)])
    torch.testing.assert_close(returns, got)


def test_of_nothing() -> None:
    none = torch.zeros(0)
    found, returns = generalised_advantages(none, none, torch.zeros(0, dtype=torch.long))
    assert found.shape == returns.shape == (0,)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_against_the_mean_of_the_group(scale: str) -> None:
    rewards = drawn(3, 4)
    rewards[1, 2] = math.nan
    found = group_advantages(rewards, scale)  # type: ignore[arg-type]
    everything = rewards[~rewards.isnan()].numpy()
    for i, row in enumerate(rewards.numpy()):
        there = row[~np.isnan(row)]
        divisor = {"group": there.std(ddof=1) + 1e-4, "batch": everything.std(ddof=1) + 1e-4, "none": 1.0}[scale]
        np.testing.assert_allclose(found[i].numpy(), np.nan_to_num((row - there.mean()) / divisor), atol=1e-12)


def test_leave_one_out() -> None:
    rewards = drawn(3, 4)
    rewards[1, 2] = rewards[2, 0] = rewards[2, 1] = rewards[2, 3] = math.nan
    found = leave_one_out(rewards)
    for i, row in enumerate(rewards.tolist()):
        for j, own in enumerate(row):
            others = [x for k, x in enumerate(row) if k != j and not math.isnan(x)]
            expected = 0.0 if math.isnan(own) or not others else own - sum(others) / len(others)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-12)


def test_equal_rewards_are_no_signal() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [math.nan, 2.0, 2.0], [math.nan, math.nan, 2.0]])
    assert without_signal(rewards).tolist() == [True, False, True, True]
    assert group_advantages(rewards)[[0, 2, 3]].abs().max() == 0 and leave_one_out(rewards)[[0, 2, 3]].abs().max() == 0


@pytest.mark.parametrize("shift", [True, False])
def test_whitened_together_on_two_ranks(shift: bool) -> None:
    x = drawn(10) * 3 + 2
    moments = Moments.of(x[:3]) + Moments.of(x[3:])
    white = torch.cat([whiten(x[:3], moments, shift=shift), whiten(x[3:], moments, shift=shift)])
    expected = (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt() + (0 if shift else x.mean())
    torch.testing.assert_close(white, expected)
    one = torch.tensor([5.0])
    assert whiten(one, Moments.of(one)).abs() < 1e-3, "one number has no spread to divide by"
