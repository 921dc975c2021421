"""A round of answers that the policy has written, with everything that is learned from them; the same on all ranks.

Notation: P prompts with G answers each, S = P G answers, prompt by prompt; N tokens of those answers that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ft.engine.rewards import Scores
from lightning_ft.engine.sampling import Answer


@dataclass(frozen=True)
class Prompt:
    """What is answered.

    Attributes:
        row: number in the data.
        given: as the data have it: a string, or a list of messages.
        ids: as the model reads it.
        columns: the other columns of its row, which rewards may ask for.
    """

    row: int
    given: str | list[dict[str, Any]]
    ids: list[int]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Round:
    """What one epoch learns from.

    Attributes:
        number: the epoch that it belongs to.
        samples: G.
        prompts: P of them; without their columns in a round that comes from a checkpoint.
        answers: S.
        texts: of the answers, without what ended them.
        scores: their rewards.
        kept: (S,) bool, which are trained on.
        tokens: name -> (N,) float32 on the CPU: what was measured or computed of each token of the kept answers, laid end to end.
        facts: what is logged of the round.
    """

    number: int
    samples: int
    prompts: list[Prompt]
    answers: list[Answer]
    texts: list[str]
    scores: Scores
    kept: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens of each answer."""
        return torch.tensor([len(answer.ids) for answer in self.answers], dtype=torch.long)

    @property
    def ended(self) -> Tensor:
        """(S,) bool, which ended by themselves."""
        return torch.tensor([answer.ended for answer in self.answers], dtype=torch.bool)

    @property
    def owner(self) -> Tensor:
        """(N,) the answer, from 0 to S - 1, of each token in ``tokens``; ascending, with gaps where answers are not kept."""
        return torch.arange(len(self.answers)).repeat_interleave(self.lengths * self.kept)

    @property
    def rewards(self) -> Tensor:
        """(P, G) float64 weighted sums; NaN where no source judged."""
        return self.scores.total.reshape(-1, self.samples)

    def state(self) -> dict[str, Any]:
        """Plain types, as a checkpoint holds them: the weights that wrote the round are gone by then."""
        return {
            "number": self.number,
            "samples": self.samples,
            "prompts": [{"row": p.row, "given": p.given, "ids": list(p.ids)} for p in self.prompts],
            "answers": [{"ids": list(a.ids), "ended": a.ended} for a in self.answers],
            "texts": list(self.texts),
            "total": self.scores.total,
            "each": dict(self.scores.each),
            "kept": self.kept,
            "tokens": dict(self.tokens),
            "facts": dict(self.facts),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Round:
        """What `state` gave."""
        return cls(
            state["number"],
            state["samples"],
            [Prompt(**one) for one in state["prompts"]],
            [Answer(**one) for one in state["answers"]],
            list(state["texts"]),
            Scores(state["total"], dict(state["each"])),
            state["kept"],
            dict(state["tokens"]),
            dict(state["facts"]),
        )
