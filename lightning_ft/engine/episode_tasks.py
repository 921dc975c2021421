"""What can be learned from episodes over a base: what their rows are, as what the base is loaded, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.scoring import row_logits, scored_hidden
from lightning_ft.models.load_task import Task

EpisodeTask = Literal[
    "sequence_classification", "token_classification", "regression", "causal_lm", "seq2seq_lm", "reward", "dpo"
]
Asks = Literal["classes", "tags", "numbers", "answers", "pairs"]


@dataclass(frozen=True)
class Kind:
    """One of them.

    Attributes:
        asks: what the rows of an episode are learned for, as the data say it.
        learns: the same in words, after "learns to".
        loads: the task that the base is loaded for.
    """

    asks: Asks
    learns: str
    loads: Task


KINDS: dict[str, Kind] = {
    "sequence_classification": Kind("classes", "tell classes apart", "sequence_classification"),
    "token_classification": Kind("tags", "tag words", "token_classification"),
    "regression": Kind("numbers", "estimate numbers", "regression"),
    "causal_lm": Kind("answers", "write answers", "causal_lm"),
    "seq2seq_lm": Kind("answers", "write answers", "seq2seq_lm"),
    "reward": Kind("pairs", "judge answers", "regression"),
    "dpo": Kind("pairs", "prefer answers", "causal_lm"),
}


@dataclass(frozen=True)
class Features:
    """What a base makes of rows before its head.

    Attributes:
        hidden: (S, D) of rows, (N, D) of scored tokens.
        batch: the rows.
    """

    hidden: Tensor
    batch: Batch


def features_of(task: str, view: Any, batch: Batch) -> Features:
    """What the head of a base reads of rows; see `outputs_of`."""
    if task in _LANGUAGE:
        return Features(_hidden(view, batch), batch)
    given = {"bounds": batch.bounds, "mask": batch.mask, "types": batch.types}
    if task == "token_classification":
        hidden = view.hidden(
            batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask, **view._typed(batch.types)
        )
        return Features(hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.scored), batch)
    return Features(view.row_hidden(batch.ids, batch.positions, **given), batch)


def outputs_of(task: str, view: Any, rows: Batch | Features) -> Tensor:
    """What a base says of rows, in fp32 at least, by ways that can be differentiated twice.

    Args:
        task: one of `KINDS`.
        view: of the base.
        rows: padded; of pairs the better answer of each stands before the worse one. Or what the head reads of them.

    Returns:
        Of classes (S, C) logits, of numbers (S, 1), of tags (N, C) logits of the tagged words, of answers (N, V) logits of the
        scored tokens; of pairs (P, 2) rewards of the better and the worse answer, or (dpo) their summed log-probabilities.
    """
    read, batch = (rows, rows.batch) if isinstance(rows, Features) else (None, rows)
    if task in _LANGUAGE:
        read = read or features_of(task, view, batch)
        # The plain way to logits, since what saves their memory elsewhere is differentiable once.
        logits = _wide(view.logits(read.hidden))
        return logits if task != "dpo" else _logps(logits, batch).reshape(-1, 2)
    if task == "token_classification":
        return _wide(view.tokens_through_head((read or features_of(task, view, batch)).hidden))
    logits = row_logits(view, batch) if read is None else _wide(view.rows_through_head(read.hidden))
    return logits[:, 0].reshape(-1, 2) if task == "reward" else logits


_LANGUAGE = ("causal_lm", "seq2seq_lm", "dpo")


def _hidden(view: Any, batch: Batch) -> Tensor:
    if batch.source is None:
        return scored_hidden(view, batch)
    hidden: Tensor = view.hidden(batch.source.ids, batch.source.mask, batch.ids, batch.mask)
    return hidden.reshape(-1, hidden.shape[-1])[batch.scored]


def _logps(logits: Tensor, batch: Batch) -> Tensor:
    """(S,) summed log-probability of the scored tokens of each segment."""
    each = logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
    return each.new_zeros(len(batch.rows)).index_add(0, batch.segment_of_scored, each)


def _wide(found: Tensor) -> Tensor:
    return found.to(torch.promote_types(found.dtype, torch.float32))


__all__ = ["KINDS", "Asks", "EpisodeTask", "Features", "Kind", "features_of", "outputs_of"]
