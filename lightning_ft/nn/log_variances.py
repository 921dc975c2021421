"""Numbers that loss balancing learns beside a model: how noisy each of its tasks is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LogVariances(nn.Module):
    """``log_variance.K``, scalars: of each term the logarithm of its noise's variance, 0 at first.

    A parameter each: gradient surgery asks which terms reach a parameter, and of one vector all would reach all of it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Args: names: of the terms, in their order."""
        super().__init__()
        self.names: list[str] = []
        self.log_variance = nn.ParameterList()
        self.take_(names)

    def take_(self, names: Sequence[str]) -> None:
        """Holds those of these terms: the ones that it has as they are, new ones from 0."""
        before = dict(zip(self.names, self.log_variance, strict=True))
        device = next(iter(before.values())).device if before else torch.device("cpu")
        new = nn.Parameter
        made = [before.get(n, new(torch.zeros((), dtype=torch.float32, device=device))) for n in names]
        self.names, self.log_variance = list(names), nn.ParameterList(made)

    @property
    def values(self) -> Tensor:
        """(K,), without gradients."""
        return torch.stack([one.detach() for one in self.log_variance])


__all__ = ["LogVariances"]
