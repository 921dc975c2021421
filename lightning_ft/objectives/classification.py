"""Losses of classes and numbers: for whole rows (one class, several, a value) and for single tokens.

One class: - w_y log softmax(z)_y. Several: the mean over C classes of the binary cross-entropies of sigmoid(z), positives
weighted by w. A value: (z - y)^2. In nats or squared units, fp32; the window divides the sum by its number of rows (or of
labelled tokens), not by the sum of weights, so that a row weighs the same whichever rows it meets in a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.scoring import row_logits
from lightning_ft.engine.terms import Term
from lightning_ft.functional.row_losses import row_losses
from lightning_ft.models.classifier import Classifier


def token_logits(model: Classifier, batch: Batch) -> Tensor:
    """Logits of each labelled token: (N, C), fp32."""
    return model.token_logits(
        batch.ids, batch.positions, batch.scored, bounds=batch.bounds, mask=batch.mask, types=batch.types
    ).float()


def row_term(model: Classifier, batch: Batch, weights: Tensor | None = None) -> Term:
    """The term ``sft`` of rows with a target each, counted in rows; a filler gives zero, with a gradient of zero."""
    logits, real = row_logits(model, batch), batch.rows >= 0
    losses = row_losses(logits, targets_of(batch), weights)
    return Term("sft", torch.where(real, losses, losses.new_zeros(())).sum(), batch.counts["row"], unit="row")


def token_term(model: Classifier, batch: Batch, weights: Tensor | None = None) -> Term:
    """The term ``sft`` of labelled tokens, counted in tokens."""
    logits = token_logits(model, batch)
    loss = F.cross_entropy(logits, batch.labels, weight=weights, reduction="sum")  # of no tokens: 0, with a gradient
    return Term("sft", loss, batch.counts["token"], unit="token")


def targets_of(batch: Batch) -> Tensor:
    """The targets of a batch whose rows have one each."""
    assert batch.targets is not None, "the data module gives rows without targets"
    return batch.targets


__all__ = ["row_losses", "row_term", "targets_of", "token_logits", "token_term"]
