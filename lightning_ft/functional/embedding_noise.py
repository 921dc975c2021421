"""NEFTune's noise: uniform, and smaller for longer rows, so that its norm does not grow with their length."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def uniform_noise(
    tokens: int,
    dim: int,
    *,
    alpha: float,
    length: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise ``U(-1, 1) alpha / sqrt(L D)`` for one row; its expected norm is ``alpha / sqrt(3)`` for any L and D.

    Args:
        tokens: how many tokens get noise, at least ``length``; those after the row's end are padding.
        dim: D, the width of the embeddings.
        alpha: the noise's size.
        length: L, the row's own length.
        generator: what it is drawn from, on ``device``; None is torch's global one.
        device: where the noise is made.

    Returns:
        (tokens, dim) in float32. The first ``length`` rows are the same for any ``tokens`` on a CPU.
    """
    drawn = torch.rand(tokens, dim, generator=generator, device=device, dtype=torch.float32)
    return drawn.mul_(2).sub_(1).mul_(alpha / math.sqrt(max(length, 1) * dim))


def row_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator that depends on the numbers of ``key`` alone, mixed so that none can cancel another."""
    state = np.random.SeedSequence([number % 2**32 for number in key]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))
