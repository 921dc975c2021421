"""What is measured of rewards on held-out pairs, in sums that add up over batches and ranks of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ft.engine.evaluation import NamedMeans
from lightning_ft.functional.advantages import Moments
from lightning_ft.functional.bradley_terry import bins_of, calibration_error


class Calibration(Metric):
    """The expected calibration error of sigmoid(r_w - r_l), the chance that an answer is the better one of its pair.

    Of each pair the model takes the answer with the larger reward, with a confidence between 1/2 and 1; in each bin of
    confidences the share of right choices should be the mean confidence. What is kept are three sums a bin.
    """

    full_state_update = False
    confident: Tensor
    right: Tensor
    counts: Tensor

    def __init__(self, bins: int) -> None:
        """Args: bins: of equal width between 1/2 and 1."""
        super().__init__()
        self.bins = bins
        for state in ("confident", "right", "counts"):
            self.add_state(state, torch.zeros(bins, device="cpu"), dist_reduce_fx="sum")

    def update(self, ahead: Tensor) -> None:
        """Adds pairs: (P,) reward of the chosen answer less that of the rejected one; a tie is half right."""
        ahead = ahead.float()
        confidence = ahead.abs().sigmoid()
        at = bins_of(confidence, self.bins)
        self.confident.index_add_(0, at, confidence)
        self.right.index_add_(0, at, (ahead.sign() + 1) / 2)
        self.counts.index_add_(0, at, torch.ones_like(ahead))

    def compute(self) -> Tensor:
        """Scalar over batches and ranks."""
        return calibration_error(self.confident, self.right, self.counts)


class RewardMoments(Metric):
    """Mean and variance of rewards, summed in float64."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, rewards: Tensor) -> None:
        """Adds rewards, (N,)."""
        wide = rewards.double()
        self.sums += torch.stack([wide.new_tensor(len(wide)), wide.sum(), wide.square().sum()])

    def compute(self) -> Tensor:
        """(3,) count, sum and sum of squares over batches and ranks."""
        return self.sums

    def moments(self) -> Moments:
        """Over batches and ranks."""
        return Moments(*self.compute().tolist())


class RewardEvaluation(nn.Module):
    """Losses and rewards of pairs, how well the differences are calibrated, and the moments of all rewards."""

    def __init__(self, names: Sequence[str], bins: int) -> None:
        """Args: names: of what is averaged; bins: of the calibration."""
        super().__init__()
        self.means = NamedMeans(names)
        self.calibration = Calibration(bins)
        self.moments = RewardMoments()

    def update(self, values: Mapping[str, tuple[Tensor, Tensor | float]], chosen: Tensor, rejected: Tensor) -> None:
        """Adds pairs: name -> (sum, count), and their rewards, (P,) each."""
        self.means.update(values)
        self.calibration.update(chosen - rejected)
        self.moments.update(torch.cat([chosen, rejected]))

    def compute(self) -> tuple[dict[str, Tensor], Moments]:
        """Name -> value over all ranks, and the moments; then nothing is left of it."""
        found = {**self.means.compute(), "calibration": self.calibration.compute()}, self.moments.moments()
        for metric in (self.means, self.calibration, self.moments):
            metric.reset()
        return found
