"""Rewards of tokens against loops, and the last tokens of answers of any length."""

import pytest
import torch

from lightning_ft.functional.token_rewards import last_tokens, token_rewards, without_end

LENGTHS = (4, 1, 7, 2)
OWNER = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_kl_everywhere_and_the_score_at_the_end(coefficient: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, dtype=torch.float64, generator=generator)
    kl = torch.randn(14, dtype=torch.float64, generator=generator)
    found = token_rewards(scores, OWNER, kl, coefficient)
    expected, at = [], 0
    for answer, length in enumerate(LENGTHS):
        for t in range(length):
            expected.append(-coefficient * float(kl[at]) + (float(scores[answer]) if t == length - 1 else 0.0))
            at += 1
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    whole = torch.stack([part.sum() for part in found.split(LENGTHS)])
    torch.testing.assert_close(whole, scores - coefficient * torch.stack([part.sum() for part in kl.split(LENGTHS)]))


def test_without_a_penalty_only_ends_are_rewarded() -> None:
    found = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), OWNER)
    assert found.nonzero()[:, 0].tolist() == last_tokens(OWNER).tolist() == [3, 4, 11, 13]
    assert found[[3, 4, 11, 13]].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_of_nothing() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert last_tokens(none).shape == token_rewards(torch.zeros(0), none).shape == (0,)


def test_what_has_no_end_loses() -> None:
    found = without_end(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False]), 0.5)
    assert found.tolist() == [1.0, 1.5, -3.5]
