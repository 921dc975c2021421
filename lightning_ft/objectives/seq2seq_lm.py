"""Log-likelihood of an answer given what an encoder has read: supervised fine-tuning of sequence-to-sequence models.

L = - sum_i log p(y_i | x, y_<i) over all tokens of the answer and its end, in nats, fp32; the window divides it by their
number. Logits exist only for these tokens, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import answer_loss
from lightning_ft.engine.terms import Term
from lightning_ft.models.seq2seq import Seq2SeqLM
from lightning_ft.nn.head_sums import Summed


def scores(model: Seq2SeqLM, batch: Batch, outputs: Sequence[str] = ("logprob",)) -> dict[str, Tensor]:
    """Scores of the batch's answer tokens, (N,) each; see `lightning_ft.objectives.causal_lm.scores`."""
    return model.score(_scored_hidden(model, batch), batch.labels, outputs=outputs)


def _scored_hidden(model: Seq2SeqLM, batch: Batch) -> Tensor:
    assert batch.source is not None, "the data module gives rows without a source"
    hidden = model.hidden(batch.source.ids, batch.source.mask, batch.ids, batch.mask)  # (B, T, D)
    return hidden.reshape(-1, hidden.shape[-1])[batch.scored]  # (N, D)


def seq2seq_lm(model: Seq2SeqLM, batch: Batch, together: Sequence[Summed] = ()) -> Term:
    """The term ``sft``: the sum of negative log-probabilities over the answers' tokens, counted in tokens.

    Args:
        model: the view of a sequence-to-sequence model.
        batch: padded rows and their sources.
        together: losses that are made of the same logits, this one the first; each gets its sum.
    """
    loss = answer_loss(model, _scored_hidden(model, batch), batch.labels, together)
    return Term("sft", loss, batch.counts["token"], unit="token")


def likelihood(model: Seq2SeqLM, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of each row: of its answer's tokens together, (S,)."""
    with ask.examples(*layouts(batch)):
        hidden = _scored_hidden(model, batch)
    return ask.of_head(hidden, batch.labels, batch.segment_of_scored, model)
