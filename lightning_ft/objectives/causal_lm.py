"""Next-token log-likelihood of the scored tokens: what supervised fine-tuning minimises.

L = - sum_i log p(y_i | x_<i) over the scored tokens i, in nats, fp32; the window divides it by its number of scored
tokens. Logits exist only for scored tokens, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import answer_loss, scored_hidden, scores
from lightning_ft.engine.terms import Term
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn.head_sums import Summed


def causal_lm(model: CausalLM, batch: Batch, together: Sequence[Summed] = ()) -> Term:
    """The term ``sft``: the sum of negative log-probabilities over the batch's scored tokens, counted in tokens.

    Args:
        model: the view of a causal model.
        batch: packed or padded rows.
        together: losses that are made of the same logits, this one the first; each gets its sum.
    """
    loss = answer_loss(model, scored_hidden(model, batch), batch.labels, together)
    return Term("sft", loss, batch.counts["token"], unit="token")


def likelihood(model: CausalLM, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of each segment: of its scored tokens together, (S,)."""
    with ask.examples(*layouts(batch)):
        hidden = scored_hidden(model, batch)
    return ask.of_head(hidden, batch.labels, batch.segment_of_scored, model)


__all__ = ["causal_lm", "likelihood", "scores"]
