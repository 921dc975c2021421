"""Random initial values that depend on a seed and a name only, so that ranks agree and order does not matter."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by SHA-256 of the seed and a parameter's name.

    Each injected parameter draws from its own generator: the same on every rank, whichever modules were injected before
    it, and without touching the global random state.

    Args:
        seed: The run's seed.
        name: Full pristine name of the parameter, with the adapter's name where several may exist.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
