"""Preference losses of a batch of pairs: one forward pass, in which an answer's prompt may stand once for both.

Segment 2i of a batch is the chosen answer of pair i, segment 2i + 1 the rejected one. Logits exist for answer tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask, layouts
from lightning_ft.engine.scoring import scored_hidden
from lightning_ft.engine.terms import Term
from lightning_ft.functional.preference import LOSSES, Pairs, Settings, needs_reference
from lightning_ft.models.causal import CausalLM

Measured = dict[str, tuple[Tensor, float]]
"""Name -> (sum, how many it was summed over)."""


def pairs_of(batch: Batch, logps: Tensor, tokens: Tensor, reference: Tensor | None = None) -> Pairs:
    """The pairs of a batch without its filler.

    Args:
        batch: its counts say how many pairs are real; they come first.
        logps: (2P,) summed log-probability of each answer.
        tokens: (2P,) number of tokens of each.
        reference: (2P,) summed log-probability of each by the reference; None without one.
    """
    real = int(batch.counts["pair"])

    def split(values: Tensor) -> tuple[Tensor, Tensor]:
        both = values.reshape(-1, 2)[:real]
        return both[:, 0], both[:, 1]

    (chosen, rejected), (chosen_tokens, rejected_tokens) = split(logps), split(tokens)
    before = split(reference) if reference is not None else (None, None)
    return Pairs(chosen, rejected, chosen_tokens, rejected_tokens, *before)


def terms(batch: Batch, pairs: Pairs, weights: Mapping[str, float], settings: Settings) -> list[Term]:
    """One term for each loss, counted in pairs; the ``sft`` loss in tokens of chosen answers.

    Args:
        batch: whose counts divide.
        pairs: its real ones; none give zero, with a gradient of zero.
        weights: name of each loss -> weight.
        settings: their numbers.
    """
    found = []
    for name, weight in weights.items():
        loss = LOSSES[name]
        found.append(Term(name, loss.of(pairs, settings).sum(), batch.counts[loss.unit], loss.unit, weight))
    return found


def measured(pairs: Pairs, weights: Mapping[str, float], settings: Settings) -> Measured:
    """What is logged of pairs, under TRL's names.

    ``rewards/chosen`` and ``rewards/rejected`` are b r(y), of losses without a reference b log p(y), divided by |y| where the
    loss divides; ``rewards/margins`` their difference; ``rewards/accuracies`` the share of pairs with a margin above 0;
    ``logps/chosen`` and ``logps/rejected`` log p(y). ``kl`` is the mean of r over all 2P answers, in nats an answer: Schulman's
    first estimator, at the answers in the data instead of the policy's own. So it tells how far the policy has gone there, may
    be negative, and is not the KL divergence itself.

    Args:
        pairs: P of them.
        weights: name of each loss -> weight.
        settings: their numbers.
    """
    count, beta = float(len(pairs.chosen)), settings.beta
    if needs_reference(weights):
        chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    elif any(LOSSES[name].means for name in weights):
        chosen, rejected = beta * pairs.chosen_mean, beta * pairs.rejected_mean
    else:
        chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    found: Measured = {name: (value.detach().sum(), count) for name, value in values.items()}
    if needs_reference(weights):
        found["kl"] = ((pairs.chosen_ratio + pairs.rejected_ratio).detach().sum(), 2 * count)
    return found


def likelihood(model: CausalLM, batch: Batch, ask: Ask) -> Tensor:
    """What ``ask`` wants to know of the chosen answer of each pair, of all its tokens together, (P,); a pair is an example."""
    ask.keys = ask.keys[::2]
    with ask.examples(*layouts(batch, per=2)):
        hidden = scored_hidden(model, batch)
    chosen = batch.segment_of_scored % 2 == 0
    return ask.of_head(hidden[chosen], batch.labels[chosen], batch.segment_of_scored[chosen] // 2, model)


__all__ = ["Measured", "likelihood", "measured", "pairs_of", "terms"]
