"""Randomness derived from (seed, batch index, rank), so that a resumed run needs no saved generator state."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def global_seed() -> int:
    """The seed that `lightning.seed_everything` set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def seed_batch(seed: int, batch_index: int, rank: int) -> None:
    """Seeds python, numpy and torch for one training batch; the three numbers are mixed so that none can cancel another."""
    state = np.random.SeedSequence([seed, batch_index, rank]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    # Where no accelerator was touched, torch would keep the seed for later with a trace of the stack for each kind of device:
    # half a millisecond, which is a tenth of a step of a small net.
    in_use = torch.cuda.is_initialized() or torch.backends.mps.is_available() or torch.xpu.is_initialized()
    (torch.manual_seed if in_use else torch.default_generator.manual_seed)(int(state[2]))


@dataclass(frozen=True)
class GlobalState:
    """The global generators as a fit found them, put back when it ends."""

    python: Any
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def capture(cls) -> GlobalState:
        """Reads the three generators."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def restore(self) -> None:
        """Writes them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
