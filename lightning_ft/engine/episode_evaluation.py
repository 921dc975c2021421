"""What is measured over episodes: means with 95 % intervals, before adapting and after some numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ft.functional.intervals import student_quantile


class EpisodeMeans(Metric):
    """Means over episodes of K numbers each, and half the width of their 95 % intervals, over batches and ranks.

    An episode counts once, whatever its number of rows, since episodes are what is independent:
    mean +- t_{n-1} s / sqrt(n), s with n - 1 in its denominator (Student, 1908).
    """

    full_state_update = False
    moments: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        """Args: names: of the numbers."""
        super().__init__()
        self.names = list(names)
        self.add_state(
            "moments", torch.zeros(len(self.names), 3, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )

    def update(self, values: Tensor) -> None:
        """Adds the numbers of some episodes: (E, K)."""
        x = values.detach().to(torch.float64)
        self.moments += torch.stack([torch.ones_like(x), x, x * x], -1).sum(0)

    def compute(self) -> dict[str, tuple[float, float]]:
        """Name -> (mean, half width); the width of fewer than two episodes is not a number."""
        found = {}
        for name, (n, total, squares) in zip(self.names, self.moments.tolist(), strict=True):
            mean = total / n if n else float("nan")
            variance = max(squares - n * mean * mean, 0.0) / (n - 1) if n > 1 else float("nan")
            found[name] = (mean, student_quantile(int(n) - 1) * (variance / n) ** 0.5 if n > 1 else variance)
        return found


__all__ = ["EpisodeMeans"]
