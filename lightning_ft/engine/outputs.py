"""What a module says of rows before any loss: logits of rows or of tokens, for techniques that compare a model with itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.scoring import scored_hidden, unmasked_row_logits
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.models.classifier import Classifier
from lightning_ft.models.seq2seq import Seq2SeqLM


@dataclass(frozen=True)
class Outputs:
    """Of one micro-batch.

    Attributes:
        logits: (N, C), of rows or of classified tokens; of a language model None, since they would be too many.
        hidden: of a language model, (N, D) of its scored tokens.
        owner: (N,) which row of the batch each belongs to.
        unit: which of the batch's counts N is.
    """

    logits: Tensor | None
    hidden: Tensor | None
    owner: Tensor | None
    unit: str
    head: Any = None
    """Of a language model, its view: `score` and `logits` of hidden states."""


def outputs(module: pl.LightningModule, batch: Any) -> Outputs:
    """Of a module of this library, or of a user's with a method ``logits(batch)`` -> (rows, classes).

    Raises:
        Refusal: a module that has neither.
    """
    if isinstance(batch, Batch):
        view = getattr(module, "view", None)
        if isinstance(view, CausalLM):
            return Outputs(None, scored_hidden(view, batch), batch.segment_of_scored, "token", view)
        if isinstance(view, Seq2SeqLM):
            assert batch.source is not None
            hidden = view.hidden(batch.source.ids, batch.source.mask, batch.ids, batch.mask)
            chosen = hidden.reshape(-1, hidden.shape[-1])[batch.scored]
            return Outputs(None, chosen, batch.segment_of_scored, "token", view)
        if isinstance(view, Classifier) and view.task == "token_classification":
            logits = view.token_logits(
                batch.ids, batch.positions, batch.scored, bounds=batch.bounds, mask=batch.mask, types=batch.types
            )
            return Outputs(logits.float(), None, batch.segment_of_scored, "token")
        if isinstance(view, Classifier):
            return Outputs(unmasked_row_logits(view, batch), None, None, "row")
    own = getattr(module, "logits", None)
    if not callable(own):
        raise Refusal(
            f"{type(module).__name__} does not say its logits, which are to be compared; give it a method logits(batch) that "
            "returns (rows, classes)."
        )
    return Outputs(own(batch), None, None, "row")


__all__ = ["Outputs", "outputs"]
