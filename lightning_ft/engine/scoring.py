"""What a view of a model makes of a batch: log-probabilities of scored tokens, their sums over segments, logits of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.models.backbone import BackboneView
from lightning_ft.models.causal import CausalLM, LanguageHead
from lightning_ft.models.classifier import Classifier
from lightning_ft.nn.head_sums import Summed


def scores(
    model: CausalLM, batch: Batch, outputs: Sequence[str] = ("logprob",), *, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Scores of the batch's scored tokens, (N,) each, differentiable in the model.

    Args:
        model: the view of a causal model.
        batch: packed or padded rows.
        outputs: what `lightning_ft.nn.head.score_tokens` can give.
        temperature: what the logits are divided by.
    """
    return model.score(scored_hidden(model, batch), batch.labels, outputs=outputs, temperature=temperature)


def answer_loss(view: LanguageHead, hidden: Tensor, labels: Tensor, together: Sequence[Summed] = ()) -> Tensor:
    """The sum of negative log-probabilities of answers, in nats, fp32 at least.

    Args:
        view: of a language model.
        hidden: (N, D) at the scored positions.
        labels: (N,) the tokens that are scored.
        together: losses that are made in one pass, this one the first; see `lightning_ft.engine.step.Step.together`.
    """
    if not together:
        return -view.score(hidden, labels)["logprob"].sum()
    view.sum_scores(hidden, labels, together)
    assert together[0].sum is not None
    return together[0].sum


def scored_hidden(model: BackboneView, batch: Batch) -> Tensor:
    """(N, D) hidden states of the batch's scored positions."""
    hidden = model.hidden(
        batch.ids, batch.positions, bounds=batch.bounds, shared=batch.shared, mask=batch.mask
    )  # (1|B, T, D)
    return hidden.reshape(-1, hidden.shape[-1])[batch.scored]


def segment_logps(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each segment's scored tokens given what stands before them, and how many they are.

    Args:
        model: the view of a causal model.
        batch: packed or padded rows, whether they share their beginnings or not.

    Returns:
        (S,) sums in nats, fp32 at least, with a gradient; (S,) counts in the same dtype.
    """
    logprob = scores(model, batch)["logprob"]  # (N,)
    none = logprob.new_zeros(len(batch.rows))
    counts = none.index_add(0, batch.segment_of_scored, torch.ones_like(logprob))
    return none.index_add(0, batch.segment_of_scored, logprob), counts


CLASS_MASK = "class_mask"
"""Column of a batch, (S, C) bool: which classes compete for each row, where a stream of tasks says so."""
MASKED = -1e4
"""Logit of a class that does not compete: no chance in float32, and no infinity in a mean loss."""


def row_logits(model: Classifier, batch: Batch) -> Tensor:
    """Logits of each segment, fillers included: (S, C), fp32; C = 1 for a value. Classes that do not compete are masked."""
    logits = unmasked_row_logits(model, batch)
    mask = batch.columns.get(CLASS_MASK)
    return logits if mask is None else logits.masked_fill(~mask, MASKED)


def unmasked_row_logits(model: Classifier, batch: Batch) -> Tensor:
    """The same of all classes, whether they compete or not."""
    return model.row_logits(
        batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask, types=batch.types, shared=batch.shared
    ).float()
