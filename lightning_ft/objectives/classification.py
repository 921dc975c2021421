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
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import row_logits
from lightning_ft.engine.terms import Term
from lightning_ft.functional.fisher import Groups
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


def row_likelihood(model: Classifier, batch: Batch, ask: Ask, several: bool = False) -> Tensor:
    """What ``ask`` wants to know of each row, (S,); class weights have no say.

    Args:
        model: the view of a classifier.
        batch: rows with a target each.
        ask: what is asked.
        several: whether several classes may hold.
    """
    with ask.examples(*layouts(batch)):
        logits = row_logits(model, batch)  # (S, C)
    targets = targets_of(batch)
    if several:
        return ask.of_bits(logits, targets)
    # (z - y)^2 is what is minimised: normal errors of variance 1/2.
    return ask.of_values(logits, targets, 0.5) if targets.is_floating_point() else ask.of_logits(logits, targets)


def token_likelihood(model: Classifier, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of each row, of its labelled tokens together, (S,)."""
    tokens = Groups(batch.scored.shape, batch.segment_of_scored, len(batch.rows), axes=2)
    with ask.examples(tokens, *layouts(batch)):
        logits = token_logits(model, batch)  # (N, C)
    return ask.of_logits(logits, batch.labels, batch.segment_of_scored)


def targets_of(batch: Batch) -> Tensor:
    """The targets of a batch whose rows have one each."""
    assert batch.targets is not None, "the data module gives rows without targets"
    return batch.targets


__all__ = ["row_losses", "row_term", "targets_of", "token_logits", "token_term"]
