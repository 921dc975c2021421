"""Losses of tokens against formulas in loops, against TRL, and what they must give for an unmoved policy."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ft.functional.kl_estimators import adapted, kl_estimate
from lightning_ft.functional.policy_gradient import (
    Clip,
    cispo_loss,
    clipped_loss,
    clipped_share,
    explained_variance,
    log_ratios,
    reduced,
    value_loss,
)

LENGTHS = (4, 1, 7, 2)
OWNER = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))


def drawn(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(14, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


LOGP, OLD, REFERENCE = drawn(0) - 3, drawn(0) - 3 + drawn(1, 0.7), drawn(2) - 3
ADVANTAGES = drawn(3)


def padded(x: Tensor) -> Tensor:
    out = x.new_zeros(4, max(LENGTHS))
    for row, part in enumerate(x.split(LENGTHS)):
        out[row, : len(part)] = part
    return out


class Accelerator:
    """What TRL's loss asks of it, on one process."""

    num_processes = 1
    gather = staticmethod(lambda x: x)
    gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def theirs(kind: str, importance: str, logp: Tensor, clip: Clip, beta: float) -> Tensor:
    """TRL's own method on a stand-in for its trainer."""
    from collections import defaultdict

    from trl import GRPOTrainer

    trainer: Any = SimpleNamespace(
        loss_type=kind, importance_sampling_level=importance, beta=beta, epsilon_low=clip.low, epsilon_high=clip.high,
        args=SimpleNamespace(delta=clip.both, use_bias_correction_kl=False, steps_per_generation=1),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        vllm_importance_sampling_correction=False, max_completion_length=9, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, accelerator=Accelerator(), model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded(logp), torch.zeros(4, 7), None),
    )  # fmt: skip
    mask = padded(torch.ones(14, dtype=torch.long))
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long), "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": mask, "completion_mask": mask, "advantages": padded(ADVANTAGES),
        "old_per_token_logps": padded(OLD), "ref_per_token_logps": padded(REFERENCE),
        "num_items_in_batch": torch.tensor(14.0),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(
    ("kind", "importance"),
    [("grpo", "token"), ("grpo", "sequence"), ("dr_grpo", "token"), ("dapo", "token"), ("bnpo", "token"), ("cispo", "token")],
)  # fmt: skip
@pytest.mark.parametrize("clip", [Clip(), Clip(0.1, 0.3, 1.2)])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_equals_trl(kind: str, importance: str, clip: Clip, beta: float) -> None:
    """Loss and gradient for the same log-probabilities."""
    ours, other = LOGP.clone().requires_grad_(), LOGP.clone().requires_grad_()
    ratio = log_ratios(ours, OLD, OWNER, importance)  # type: ignore[arg-type]
    cut = cispo_loss(ratio, ours, ADVANTAGES, clip.high) if kind == "cispo" else clipped_loss(ratio, ADVANTAGES, clip)
    losses = cut + beta * kl_estimate(ours, REFERENCE, "k3")
    total, unit = reduced(losses, OWNER, 4, kind, longest=9)  # type: ignore[arg-type]
    loss = total / {"token": 14, "row": 4}[unit]
    expected = theirs(kind, importance, other, clip, beta)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(f, x)[0] for f, x in ((loss, ours), (expected, other))))


def test_an_unmoved_policy_has_ratio_1_and_the_plain_gradient() -> None:
    logp = LOGP.clone().requires_grad_()
    ratio = log_ratios(logp, LOGP, OWNER)
    assert torch.equal(ratio.detach().exp(), torch.ones(14, dtype=torch.float64))
    losses = clipped_loss(ratio, ADVANTAGES, Clip())
    torch.testing.assert_close(losses.detach(), -ADVANTAGES)
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    torch.testing.assert_close(slope, -ADVANTAGES)
    assert not any(bool(side.any()) for side in clipped_share(ratio, ADVANTAGES, Clip()))


def test_the_sequence_ratio_is_the_geometric_mean() -> None:
    found = log_ratios(LOGP, OLD, OWNER, "sequence").exp()
    for answer in range(4):
        own = answer == OWNER
        mean = np.prod((LOGP - OLD)[own].exp().numpy()) ** (1 / LENGTHS[answer])
        np.testing.assert_allclose(found[own].numpy(), mean)


def test_what_is_clipped_has_no_gradient() -> None:
    logp = LOGP.clone().requires_grad_()
    ratio = log_ratios(logp, OLD, OWNER)
    (slope,) = torch.autograd.grad(clipped_loss(ratio, ADVANTAGES, Clip()).sum(), logp)
    low, high = clipped_share(ratio, ADVANTAGES, Clip())
    assert low.any() and high.any() and torch.equal(slope == 0, low | high)
    (slope,) = torch.autograd.grad(cispo_loss(log_ratios(logp, OLD, OWNER), logp, ADVANTAGES, 1.2).sum(), logp)
    assert (slope != 0).all()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_values(clip: float | None) -> None:
    values, old, returns = drawn(4), drawn(5), drawn(6)
    for v, o, r, found in zip(values, old, returns, value_loss(values, old, returns, clip), strict=True):
        bounded = v if clip is None else min(max(v, o - clip), o + clip)
        assert float(found) == pytest.approx(0.5 * max(float(v - r) ** 2, float(bounded - r) ** 2))


def test_explained_variance() -> None:
    from sklearn.metrics import explained_variance_score

    values, returns = drawn(4), drawn(4) + drawn(5, 0.3)
    assert float(explained_variance(values, returns)) == pytest.approx(explained_variance_score(returns, values))
    assert math.isnan(float(explained_variance(values, torch.ones(14))))


def test_estimates_of_the_kl() -> None:
    """Over all tokens of a distribution: k1 and k3 are the KL, k3 is never negative, k2's gradient is the KL's."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, dtype=torch.float64, generator=generator).requires_grad_()
    logp, logq = z.log_softmax(-1), torch.randn(20, dtype=torch.float64, generator=generator).log_softmax(-1)
    p = logp.exp()
    kl = (p * (logp - logq)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(logp, logq, estimator)).sum(), kl)  # type: ignore[arg-type]
    assert (kl_estimate(logp, logq, "k3") >= 0).all()
    (slope,) = torch.autograd.grad((p.detach() * kl_estimate(logp, logq, "k2")).sum(), z, retain_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(kl, z)[0])


def test_the_coefficient_follows_the_kl() -> None:
    """The rule of Ziegler et al.: at most a fifth of the error counts."""
    assert adapted(0.1, 6.0, target=6.0, horizon=1e4, steps=64) == 0.1
    assert adapted(0.1, 60.0, target=6.0, horizon=100, steps=50) == pytest.approx(0.1 * 1.1)
    assert adapted(0.1, 0.0, target=6.0, horizon=100, steps=50) == pytest.approx(0.1 * 0.9)
    assert adapted(0.1, 6.6, target=6.0, horizon=100, steps=50) == pytest.approx(0.1 * 1.05)
