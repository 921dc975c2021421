"""How much better an answer, or a token of it, was than expected; from rewards alone.

Tokens of S answers are laid end to end, (N,), each answer's in their order; ``owner`` (N,) says whose each is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
#: Added to a standard deviation before it divides, as in TRL: rewards that are all but equal must not become large.
EPSILON = 1e-4


def generalised_advantages(
    rewards: Tensor, values: Tensor, owner: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, equation 16); after its last token an answer is worth nothing.

    ``A_t = sum_k (gamma lam)^k delta_{t+k}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``.

    Args:
        rewards: (N,) what was got for each token.
        values: (N,) what was expected from the state before each token on.
        owner: (N,) int64, ascending: the answer of each token.
        gamma: discount of what comes a token later.
        lam: 0 trusts the values, 1 what was got.

    Returns:
        (N,) advantages, and (N,) returns, which the values are to learn: advantages + values.
    """
    if not len(rewards):
        return rewards.clone(), values.clone()
    begins = torch.searchsorted(owner, owner)
    at = torch.arange(len(owner), device=owner.device) - begins
    shape = (int(owner[-1]) + 1, int(at.max()) + 1)

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(shape).index_put((owner, at), x)

    reward, value = padded(rewards), padded(values)
    advantage = torch.zeros_like(reward)
    following, carried = torch.zeros_like(reward[:, 0]), torch.zeros_like(reward[:, 0])
    for t in reversed(range(shape[1])):
        # Padding has reward and value 0, so that what is carried through it stays 0.
        delta = reward[:, t] + gamma * following - value[:, t]
        carried = delta + gamma * lam * carried
        advantage[:, t], following = carried, value[:, t]
    found = advantage[owner, at]
    return found, found + values


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """Each answer's reward against the mean of those to the same prompt (Shao et al., 2024, section 4.1.2).

    Args:
        rewards: (P, G), of G answers to each of P prompts; NaN where an answer could not be scored, which then counts nowhere.
        scale: what differences are divided by: the standard deviation (n - 1) of the ``group``, of the whole ``batch``, or
            nothing (Liu et al., 2025: dividing favours prompts that are too easy or too hard).

    Returns:
        (P, G); 0 where an answer could not be scored.
    """
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "group":
        centred = centred / (_deviation(rewards, 1) + EPSILON)
    elif scale == "batch":
        centred = centred / (_deviation(rewards.reshape(1, -1), 1) + EPSILON)
    return centred.nan_to_num(nan=0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each answer's reward against the mean of the *others* to the same prompt: RLOO (Ahmadian et al., 2024, equation 8).

    Args:
        rewards: (P, G), NaN where an answer could not be scored.

    Returns:
        (P, G); 0 where an answer could not be scored, or no other could.
    """
    there = (~rewards.isnan()).sum(1, keepdim=True).to(rewards.dtype)
    others = (rewards.nansum(1, keepdim=True) - rewards) / (there - 1)
    return torch.where(there > 1, rewards - others, torch.zeros_like(rewards)).nan_to_num(nan=0.0)


def without_signal(rewards: Tensor) -> Tensor:
    """(P,) bool: prompts (P, G) whose answers all got the same reward, or fewer than two of which could be scored."""
    spread = rewards.nan_to_num(nan=-torch.inf).amax(1) - rewards.nan_to_num(nan=torch.inf).amin(1)
    return ((~rewards.isnan()).sum(1) < 2) | (spread == 0)


def _deviation(rewards: Tensor, dim: int) -> Tensor:
    """Standard deviation (n - 1) of what is not NaN, 0 of a single number."""
    there = ~rewards.isnan()
    count = there.sum(dim, keepdim=True)
    squares = (rewards - rewards.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of numbers; those of two ranks are added.

    Attributes:
        count: how many.
        total: their sum.
        squares: the sum of their squares.
    """

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of any tensor, in float64."""
        wide = x.double()
        return cls(float(x.numel()), float(wide.sum()), float(wide.square().sum()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """The mean square distance from the mean (divided by n), 0 of nothing."""
        return max(self.squares / self.count - self.mean**2, 0.0) if self.count else 0.0


def whiten(x: Tensor, moments: Moments, *, shift: bool = True) -> Tensor:
    """Numbers with variance 1, and with mean 0 if ``shift``.

    Args:
        x: any shape.
        moments: of all numbers that are whitened together, on all ranks.
        shift: False keeps their mean, as for rewards (whose sign says whether an answer was good).
    """
    white = (x - moments.mean) * (moments.variance + 1e-8) ** -0.5
    return white if shift else white + moments.mean
