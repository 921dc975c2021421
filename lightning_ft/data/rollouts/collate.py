"""Answers of a round -> :class:`~lightning_ft.engine.batch.Batch`, with what is known of each of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_ft.data.collate_pairs import VOID, Answer, Answered, lay_out
from lightning_ft.engine.batch import Batch


@dataclass(frozen=True)
class Rollout:
    """An answer as a row to learn from.

    Attributes:
        prompt: (T,) token ids.
        answer: (T,) token ids, all of them scored.
        group: answers with the same number have the same prompt.
        row: of the prompt in the data.
        tokens: name -> (T,) what is known of each token of the answer.
    """

    prompt: np.ndarray
    answer: np.ndarray
    group: int
    row: int
    tokens: Mapping[str, Tensor]


def collate_rollouts(
    rollouts: Sequence[Rollout],
    names: Sequence[str],
    *,
    packed: bool,
    shared: bool,
    window: dict[str, float] | None = None,
) -> Batch:
    """One micro-batch; ``columns`` hold (N,) float32 for each of ``names``, one number for each scored token.

    Units: ``row`` (answers) and ``token``.

    Args:
        rollouts: the answers; none gives a filler.
        names: what is known of tokens.
        packed: end to end, or padded.
        shared: whether the prompt of several answers is laid out once; needs ``packed``.
        window: totals of the accumulation window.
    """
    first: dict[int, int] = {}
    answered: list[Answered] = []
    for number, one in enumerate(rollouts):
        spans = np.array([[0, len(one.answer)]])
        answered.append(Answered(one.prompt, Answer(one.answer, spans), one.row, like=first.get(one.group)))
        first.setdefault(one.group, number)
    batch = lay_out(answered or [VOID], packed=packed, shared=shared)
    return replace(
        batch,
        counts={"row": float(len(rollouts)), "token": float(len(batch.scored))},
        window=window,
        columns={name: torch.cat([torch.zeros(0), *(one.tokens[name] for one in rollouts)]) for name in names},
    )
