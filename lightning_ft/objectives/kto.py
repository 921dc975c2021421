"""KTO of a batch of single answers, each good or bad, beside answers to other prompts from which the KL term is estimated.

Segments 0 to S - 1 of a batch are rows with a target each, 1 for a good answer; segments S to 2S - 1 the same prompts with the
answers of other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import scored_hidden
from lightning_ft.engine.terms import Term
from lightning_ft.functional import kto
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM

Measured = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, how many it was summed over)."""


@dataclass(frozen=True)
class Settings:
    """The numbers of the objective.

    Attributes:
        loss: ``kto``, or ``apo_zero_unpaired``, which has no KL term.
        beta: how strongly the policy is held to the reference.
        good: weight of good answers.
        bad: weight of bad ones.
    """

    loss: kto.KTOLoss = "kto"
    beta: float = 0.1
    good: float = 1.0
    bad: float = 1.0


@dataclass(frozen=True)
class Answers:
    """What is known of a batch's answers.

    Attributes:
        logps: (S,) log p(y), those of a filler too.
        reference: (S,) log q(y).
        desirable: (S,) bool.
        real: (S,) bool, False for a filler.
        mismatched: (S,) log p(y') - log q(y') of answers to other prompts, 0 for a filler; None where the batch has none.
    """

    logps: Tensor
    reference: Tensor
    desirable: Tensor
    real: Tensor
    mismatched: Tensor | None


def targets_of(batch: Batch) -> Tensor:
    """(S,) 1 for a good answer, 0 for a bad one.

    Raises:
        Refusal: the batch does not say.
    """
    if batch.targets is None:
        raise Refusal(
            "KTO needs rows that are labelled good or bad; use UnpairedPreferenceData (prompt, completion, label)."
        )
    return batch.targets


def answers_of(batch: Batch, logps: Tensor, reference: Tensor) -> Answers:
    """The answers of a batch.

    Args:
        batch: with ``targets`` (S,).
        logps: (S,) or (2S,) summed log-probability of each segment's answer, mismatched ones last.
        reference: the same by the reference.
    """
    targets = targets_of(batch)
    own = len(targets)
    real = batch.rows[:own] >= 0
    apart = (logps - reference)[own:].detach()
    mismatched = apart * real if len(apart) else None
    return Answers(logps[:own], reference[:own], targets > 0.5, real, mismatched)


def mismatched_sum(answers: Answers) -> Tensor:
    """(2,) the sum of the log-ratios of mismatched answers, and their number: to be added up over ranks.

    Raises:
        Refusal: the batch has none.
    """
    if answers.mismatched is None:
        raise Refusal(
            "KTO estimates its KL term from answers to other prompts, and the batches hold none; use UnpairedPreferenceData, or "
            "the loss apo_zero_unpaired, which has no such term."
        )
    return torch.stack([answers.mismatched.sum(), answers.real.sum().to(answers.mismatched.dtype)])


def term(batch: Batch, answers: Answers, kl: Tensor, settings: Settings) -> Term:
    """The term ``kto`` (or ``apo_zero_unpaired``), counted in rows; a filler gives zero, with a gradient of zero."""
    ratio, weights = answers.logps - answers.reference, {"good": settings.good, "bad": settings.bad}
    if settings.loss == "kto":
        losses = kto.kto(ratio, answers.desirable, kl, settings.beta, **weights)
    else:
        losses = kto.apo_zero_unpaired(ratio, answers.desirable, settings.beta, **weights)
    total = torch.where(answers.real, losses, torch.zeros_like(losses)).sum()
    return Term(settings.loss, total, batch.counts["row"], unit="row")


def measured(answers: Answers, kl: Tensor, settings: Settings) -> Measured:
    """What is logged, under TRL's names.

    ``rewards/chosen`` and ``logps/chosen`` are means over good answers, those of ``rejected`` over bad ones; ``kl`` is the mean
    of the estimates of the window's micro-batches.
    """
    rewards = settings.beta * (answers.logps - answers.reference).detach()
    good, bad = answers.real & answers.desirable, answers.real & ~answers.desirable
    found: Measured = {}
    for name, chosen in (("chosen", good), ("rejected", bad)):
        count = chosen.sum().to(rewards.dtype)
        found[f"rewards/{name}"] = ((rewards * chosen).sum(), count)
        found[f"logps/{name}"] = ((answers.logps.detach() * chosen).sum(), count)
    if settings.loss == "kto":
        found["kl"] = (kl, torch.ones_like(kl))
    return found


def with_margins(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means and ``rewards/margins``, the difference of those of good and of bad answers."""
    return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


def likelihood(model: CausalLM, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of each good answer, of all its tokens together, (2S,); other answers are no examples."""
    assert batch.targets is not None, "the data module gives rows without a target"
    good = (batch.targets > 0.5).tolist()
    ask.keys = [key if i < len(good) and good[i] else -1 for i, key in enumerate(ask.keys)]
    with ask.examples(*layouts(batch)):
        hidden = scored_hidden(model, batch)
    return ask.of_head(hidden, batch.labels, batch.segment_of_scored, model)


__all__ = [
    "Answers",
    "Measured",
    "Settings",
    "answers_of",
    "likelihood",
    "measured",
    "mismatched_sum",
    "targets_of",
    "term",
    "with_margins",
]
