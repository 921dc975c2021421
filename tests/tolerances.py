"""Tolerances depend on the dtype alone; a test that needs more has found a bug or says why beside the number."""

import torch
from torch import Tensor

TOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_gradient(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Of a matrix as a whole: a small element may be the difference of large ones, by as much as a CPU's instructions differ."""
    assert found.shape == expected.shape, what
    error, size = float((found - expected).norm()), float(expected.norm())
    # Some have none but what rounding leaves, such as that of a key's bias.
    assert error <= tolerance * size + 1e-6, f"{what}: {error:.2e} of {size:.2e}"
