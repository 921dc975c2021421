"""Next-token log-likelihood of the scored tokens: what supervised fine-tuning minimises.

L = - sum_i log p(y_i | x_<i) over the scored tokens i, in nats, fp32; the window divides it by its number of scored
tokens. Logits exist only for scored tokens, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.terms import Term
from lightning_ft.models.causal import CausalLM


def scores(model: CausalLM, batch: Batch, outputs: Sequence[str] = ("logprob",)) -> dict[str, Tensor]:
    """Scores of the batch's scored tokens, (N,) each, differentiable in the model.

    Args:
        model: the view of a causal model.
        batch: packed or padded rows.
        outputs: what `lightning_ft.nn.head.score_tokens` can give.
    """
    hidden = model.hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask)  # (1|B, T, D)
    chosen = hidden.reshape(-1, hidden.shape[-1])[batch.scored]  # (N, D)
    return model.score(chosen, batch.labels, outputs=outputs)


def causal_lm(model: CausalLM, batch: Batch) -> Term:
    """The term ``sft``: the sum of negative log-probabilities over the batch's scored tokens, counted in tokens."""
    logprob = scores(model, batch)["logprob"]  # (N,)
    return Term("sft", -logprob.sum(), batch.counts["token"], unit="token")
