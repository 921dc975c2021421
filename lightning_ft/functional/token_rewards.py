"""What each token of an answer is rewarded with, from one score for the whole answer and the KL to a reference.

Tokens of S answers are laid end to end, (N,), each answer's in their order; ``owner`` (N,) int64, ascending, says whose each is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, owner: Tensor, kl: Tensor | None = None, coefficient: float = 0.0) -> Tensor:
    """(N,) ``- coefficient * kl`` for every token, and the answer's score on top at its last one (Ouyang et al., 2022, eq. 2).

    Args:
        scores: (S,) of answers.
        owner: (N,) each answer has a token at least.
        kl: (N,) an estimate of the KL from the reference at each token, ``log p - log q``; None: no penalty.
        coefficient: of the penalty, in score a nat.
    """
    rewards = scores.new_zeros(len(owner)) if kl is None else -coefficient * kl.to(scores.dtype)
    return rewards.index_add(0, last_tokens(owner), scores[owner[last_tokens(owner)]])


def last_tokens(owner: Tensor) -> Tensor:
    """(S,) int64 where the last token of each answer stands."""
    if not len(owner):
        return owner.new_zeros(0)
    ends = torch.ones_like(owner, dtype=torch.bool)
    ends[:-1] = owner[1:] != owner[:-1]
    return ends.nonzero()[:, 0]


def without_end(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """(S,) scores less ``penalty`` where the answer was cut by the limit of tokens instead of ending by itself.

    Args:
        scores: (S,).
        ended: (S,) bool.
        penalty: at least 0; Ziegler et al. (2019) give a fixed low score instead, TRL subtracts as here.
    """
    return scores - penalty * (~ended).to(scores.dtype)
