"""NEFTune's noise against its definition."""

import math

import pytest
import torch

from lightning_ft.functional.embedding_noise import row_generator, uniform_noise


@pytest.mark.parametrize(("length", "dim", "alpha"), [(7, 16, 5.0), (300, 64, 10.0), (1, 8, 0.5)])
def test_it_is_uniform_within_the_paper_s_bound(length, dim, alpha):
    bound = alpha / math.sqrt(length * dim)
    draws = torch.cat(
        [
            uniform_noise(length, dim, alpha=alpha, length=length, generator=row_generator("cpu", 0, n)).reshape(-1)
            for n in range(max(1, 40_000 // (length * dim)))
        ]
    ).double()
    assert draws.abs().max() <= bound * (1 + 1e-6)
    n = len(draws)
    # A uniform variable on [-b, b]: mean 0, variance b^2 / 3, fourth moment b^4 / 5; four standard errors.
    assert abs(draws.mean()) < 4 * bound / math.sqrt(3 * n)
    assert abs(draws.square().mean() - bound**2 / 3) < 4 * bound**2 * math.sqrt(4 / 45 / n)
    assert abs((draws < 0.5 * bound).double().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / n)


@pytest.mark.parametrize("length", [3, 50, 900])
def test_its_norm_does_not_grow_with_the_length(length):
    noise = uniform_noise(length, 64, alpha=5.0, length=length, generator=row_generator("cpu", 3, length)).double()
    expected = 5.0 / math.sqrt(3)  # sqrt(L D) components of variance alpha^2 / (3 L D)
    assert abs(float(noise.norm()) / expected - 1) < 4 * math.sqrt(1 / 5 / (length * 64))


def test_padding_does_not_change_what_the_row_gets():
    short, long = (uniform_noise(n, 8, alpha=5.0, length=6, generator=row_generator("cpu", 1, 2)) for n in (6, 31))
    assert torch.equal(short, long[:6])


def test_each_number_of_the_key_counts():
    draws = {float(torch.rand(1, generator=row_generator("cpu", *key))) for key in [(0, 1), (1, 0), (0, -1), (2, 1)]}
    assert len(draws) == 4
    again = (torch.rand(3, generator=row_generator("cpu", 4, -1, 5)) for _ in range(2))
    assert torch.equal(*again)
