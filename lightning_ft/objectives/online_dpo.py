"""Preference losses of pairs that the policy has written itself: of the answers to a prompt the best against the worst."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.terms import Term
from lightning_ft.functional.preference import LOSSES, Pairs, Settings


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) int64 each: which answers to each prompt were rewarded most and least, the first of equals; -1 where none differ.

    Args:
        rewards: (P, G), NaN where an answer was not judged.
    """
    best = rewards.nan_to_num(nan=-torch.inf).argmax(1)
    worst = rewards.nan_to_num(nan=torch.inf).argmin(1)
    highest, lowest = (rewards.gather(1, at[:, None])[:, 0] for at in (best, worst))
    differ = highest > lowest  # not so where one is not a number
    return torch.where(differ, best, -1), torch.where(differ, worst, -1)


def pairs_of(batch: Batch, logps: Tensor) -> Pairs:
    """The pairs of a batch of two answers to each prompt, which follow one another, in either order.

    Args:
        batch: whose ``columns`` have ``better`` (N,), 1 at the tokens of the better answer and 0 at the others', and
            ``reference_logps`` (N,).
        logps: (N,) log-probabilities of the scored tokens now.
    """
    answers, owner = int(batch.counts["row"]), batch.segment_of_scored
    columns = torch.stack([logps, batch.columns["reference_logps"].to(logps), torch.ones_like(logps)])
    sums = columns.new_zeros(3, len(batch.rows)).index_add(1, owner, columns)[:, :answers].reshape(3, answers // 2, 2)
    better = logps.new_zeros(len(batch.rows)).index_add(0, owner, batch.columns["better"].to(logps))[:answers]
    first = (better.reshape(answers // 2, 2)[:, 0] > 0)[None]
    chosen = torch.where(first, sums[..., 0], sums[..., 1])
    rejected = torch.where(first, sums[..., 1], sums[..., 0])
    return Pairs(chosen[0], rejected[0], chosen[2], rejected[2], chosen[1], rejected[1])


def term(batch: Batch, pairs: Pairs, loss: str, settings: Settings) -> Term:
    """The mean of a loss over pairs: twice its sum over the number of answers, which is what a window counts."""
    return Term(loss, 2 * LOSSES[loss].of(pairs, settings).sum(), batch.counts["row"], "row")


__all__ = ["best_and_worst", "pairs_of", "term"]
