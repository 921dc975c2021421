"""Rewards of a batch's segments by a model with a head of one output, and the losses of its pairs.

Segment 2i of a batch is the chosen answer of pair i, segment 2i + 1 the rejected one; their prompt may stand once for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import row_logits
from lightning_ft.engine.terms import Term
from lightning_ft.functional.bradley_terry import bradley_terry, centring
from lightning_ft.models.classifier import Classifier

Measured = dict[str, tuple[Tensor, float]]
"""Name -> (sum, how many it was summed over)."""

MEASURED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "accuracy")


def rewards(model: Classifier, batch: Batch) -> Tensor:
    """The reward of each segment, fillers included: (S,), fp32; read at its last token, or as an encoder's own head does."""
    return row_logits(model, batch)[:, 0]


def pairs(batch: Batch, found: Tensor) -> tuple[Tensor, Tensor]:
    """The rewards of the chosen and of the rejected answers, (P,) each, without fillers.

    Args:
        batch: its count of pairs says how many are real; they come first.
        found: (2P,) rewards of its segments.
    """
    both = found.reshape(-1, 2)[: int(batch.counts["pair"])]
    return both[:, 0], both[:, 1]


def likelihood(model: Classifier, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of which answer of each pair is the better one, (P,); margins have no say."""
    ask.keys = ask.keys[::2]
    with ask.examples(*layouts(batch, per=2)):
        both = rewards(model, batch).reshape(-1, 2)
    return ask.of_logits(both, torch.zeros(len(both), dtype=torch.int64, device=both.device))


def terms(batch: Batch, chosen: Tensor, rejected: Tensor, centre: float | None = None) -> list[Term]:
    """``bradley_terry``, and with a coefficient ``centring``, each counted in pairs; of no pairs zero, with a gradient of zero.

    Args:
        batch: whose counts divide, and whose margins (column ``margin``) are taken where it has them.
        chosen: (P,) rewards.
        rejected: (P,) rewards.
        centre: factor of the centring term; None: there is none.
    """
    count = batch.counts["pair"]
    loss = bradley_terry(chosen, rejected, batch.columns["margin"] if "margin" in batch.columns and count else None)
    found = [Term("bradley_terry", loss.sum(), count, unit="pair")]
    if centre is not None:
        found.append(Term("centring", centring(chosen, rejected).sum(), count, unit="pair", weight=centre))
    return found


def measured(chosen: Tensor, rejected: Tensor) -> Measured:
    """What is logged of pairs: mean rewards, their differences, and ``accuracy``, the share with the chosen one ahead."""
    ahead = (chosen - rejected).detach()
    values = (chosen.detach(), rejected.detach(), ahead, (ahead > 0).to(ahead.dtype))
    return {name: (value.sum(), float(len(value))) for name, value in zip(MEASURED, values, strict=True)}
