"""Next-token log-likelihood of the scored tokens: what supervised fine-tuning minimises.

L = - sum_i log p(y_i | x_<i) over the scored tokens i, in nats, fp32; the window divides it by its number of scored
tokens. Logits exist only for scored tokens, a chunk at a time.
"""

from __future__ import annotations

from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import scored_hidden, scores
from lightning_ft.engine.terms import Term
from lightning_ft.models.causal import CausalLM


def causal_lm(model: CausalLM, batch: Batch) -> Term:
    """The term ``sft``: the sum of negative log-probabilities over the batch's scored tokens, counted in tokens."""
    logprob = scores(model, batch)["logprob"]  # (N,)
    return Term("sft", -logprob.sum(), batch.counts["token"], unit="token")


def likelihood(model: CausalLM, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of each segment: of its scored tokens together, (S,)."""
    with ask.examples(*layouts(batch)):
        hidden = scored_hidden(model, batch)
    return ask.of_head(hidden, batch.labels, batch.segment_of_scored, model)


__all__ = ["causal_lm", "likelihood", "scores"]
