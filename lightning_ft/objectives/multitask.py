"""One term a task, from hidden states that were computed once for the rows of all.

Each term is the sum of its task's losses, counted in the task's own unit (``row:NAME`` or ``token:NAME``), so that a window divides
it by what the task has in it. A task without rows gives zero, with a gradient of zero in what is its own, so that ranks agree on
which parameters have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.batch_part import part_of
from lightning_ft.engine.task_list import BY_TOKEN, Objective
from lightning_ft.engine.terms import Term
from lightning_ft.functional.bradley_terry import bradley_terry
from lightning_ft.functional.preference import LOSSES, Pairs, Settings
from lightning_ft.functional.row_losses import row_losses

Score = Callable[[Tensor, Tensor, tuple[str, ...]], dict[str, Tensor]]
"""(hidden states (N, D), tokens (N,), outputs) -> scores by a language head."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        number: its place among the tasks.
        name: under which it is logged.
        objective: what it learns.
        own: parameters that no other task's rows reach.
    """

    number: int
    name: str
    objective: Objective
    own: tuple[nn.Parameter, ...] = ()

    @property
    def unit(self) -> str:
        """What its term is counted in; a pair of answers is a row."""
        return f"{'token' if self.objective in BY_TOKEN else 'row'}:{self.name}"


@dataclass(frozen=True)
class Comparison:
    """How a policy is taught by pairs: one of the losses of `lightning_ft.functional.preference` that are counted in pairs.

    Attributes:
        name: of the loss.
        settings: its numbers.
    """

    name: str = "sigmoid"
    settings: Settings = Settings()

    @property
    def refers(self) -> bool:
        """Whether it compares with a reference."""
        return LOSSES[self.name].reference


@dataclass(frozen=True)
class Outcome:
    """What the model says of a task's rows or tokens.

    Attributes:
        losses: (N,) in nats or squared units.
        logits: (N, C), of heads; of pairs (N, 2), the rewards of the better and of the worse answer; of a language model None.
        targets: (N,) or (N, C); of pairs (N,) zeros.
        correct: (N,) of a language model: whether the token was the most likely one.
        segments: (N,) of tokens: the row of the batch that each belongs to.
    """

    losses: Tensor
    logits: Tensor | None
    targets: Tensor
    correct: Tensor | None = None
    segments: Tensor | None = None


def outcome(
    task: Task,
    batch: Batch,
    rows: Tensor,
    hidden: Tensor,
    head: nn.Module | None,
    score: Score,
    *,
    accuracy: bool = False,
    comparison: Comparison | None = None,
    reference: Tensor | None = None,
) -> Outcome | None:
    """What a task makes of its part of a batch; None where it has none.

    Args:
        task: which.
        batch: with the columns of `lightning_ft.data.task_rows.TaskCollate`.
        rows: (S, D) a vector for each row of the batch.
        hidden: (T, D) all hidden states, end to end.
        head: of the task; None for a language model.
        score: of a language model.
        accuracy: whether ``correct`` is wanted.
        comparison: of a task that is dpo.
        reference: (S,) log-probability of each row of the batch by the reference, where the comparison refers to it; without
            it the logits of dpo are log-probabilities, and its losses 0.
    """
    if task.objective in BY_TOKEN:
        places = batch.columns.get(f"scored/{task.number}")
        if places is None or not len(places):
            return None
        chosen, labels = hidden.index_select(0, batch.scored[places]), batch.labels[places]
        if task.objective == "causal_lm":
            found = score(chosen, labels, ("logprob", "correct") if accuracy else ("logprob",))
            return Outcome(-found["logprob"], None, labels, found.get("correct"))
        assert head is not None
        logits = head(chosen).float()
        return Outcome(row_losses(logits, labels), logits, labels, segments=batch.segment_of_scored[places])
    mine = batch.columns.get(f"rows/{task.number}")
    if mine is None:
        return None
    if task.objective == "reward":
        assert head is not None
        given = head(rows.index_select(0, mine)).float().reshape(-1, 2)
        losses = bradley_terry(given[:, 0], given[:, 1], batch.columns.get(f"margin/{task.number}"))
        return Outcome(losses, given, mine.new_zeros(len(given)))
    if task.objective == "dpo":
        assert comparison is not None
        return _compared(comparison, batch, mine, batch.columns[f"scored/{task.number}"], hidden, score, reference)
    assert head is not None
    logits, targets = head(rows.index_select(0, mine)).float(), batch.columns[f"targets/{task.number}"]
    return Outcome(row_losses(logits, targets), logits, targets)


def _compared(
    comparison: Comparison,
    batch: Batch,
    mine: Tensor,
    places: Tensor,
    hidden: Tensor,
    score: Score,
    reference: Tensor | None,
) -> Outcome:
    logprob = score(hidden.index_select(0, batch.scored[places]), batch.labels[places], ("logprob",))["logprob"]
    none, owner = logprob.new_zeros(len(batch.rows)), batch.segment_of_scored[places]
    logps, tokens = none.index_add(0, owner, logprob), none.index_add(0, owner, torch.ones_like(logprob))

    def split(values: Tensor) -> tuple[Tensor, Tensor]:
        both = values[mine].reshape(-1, 2)
        return both[:, 0], both[:, 1]

    before = split(reference) if reference is not None else (None, None)
    pairs = Pairs(*split(logps), *split(tokens), *before)
    loss, beta = LOSSES[comparison.name], comparison.settings.beta
    rewards = (pairs.chosen, pairs.rejected)
    if loss.reference and reference is None:  # a prediction, which compares with nothing
        return Outcome(logps.new_zeros(len(pairs.chosen)), torch.stack(rewards, 1), mine.new_zeros(len(pairs.chosen)))
    if loss.reference:
        rewards = (pairs.chosen_ratio, pairs.rejected_ratio)
    elif loss.means:
        rewards = (pairs.chosen_mean, pairs.rejected_mean)
    losses = loss.of(pairs, comparison.settings)
    return Outcome(losses, beta * torch.stack(rewards, 1), mine.new_zeros(len(losses)))


def of_task(batch: Batch, task: Task) -> Batch:
    """The rows of one task of a batch as a batch of their own, with the columns that `outcome` reads."""
    number = task.number
    mine = batch.columns[f"rows/{number}"]
    part = part_of(batch, mine.tolist())
    columns = {name: batch.columns[name] for name in (f"targets/{number}", f"margin/{number}") if name in batch.columns}
    columns[f"rows/{number}"] = torch.arange(len(mine), device=mine.device)
    if f"scored/{number}" in batch.columns:
        columns[f"scored/{number}"] = torch.arange(len(part.scored), device=mine.device)
    return replace(part, columns=columns)


def terms(
    batch: Batch, tasks: Iterable[Task], found: Mapping[str, Outcome | None], weights: Mapping[str, float]
) -> list[Term]:
    """One term for each task, in their order.

    Args:
        batch: whose counts divide.
        tasks: all.
        found: name -> what the task made of the batch.
        weights: name -> weight of the task's mean.
    """
    made = []
    for task in tasks:
        seen = found[task.name]
        total = seen.losses.sum() if seen is not None else touched(task.own, batch.ids.device)
        count = batch.counts.get(task.unit, 0.0)
        made.append(Term(task.name, total, count, task.unit, weights[task.name], task.own))
    return made


def present(batch: Batch, tasks: Iterable[Task]) -> dict[str, Tensor]:
    """Name of each task that has rows in a batch -> which."""
    return {task.name: mine for task in tasks if (mine := batch.columns.get(f"rows/{task.number}")) is not None}


def touched(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Zero, with a gradient of zero in each parameter that this rank has whole now.

    What lies in an FSDP2 unit of its own (an adapter in a block) has its gradient from that unit's forward pass.
    """
    total = torch.zeros((), device=device)
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            total = total + parameter.reshape(-1)[:1].sum() * 0.0
    return total


__all__ = [
    "BY_TOKEN",
    "Comparison",
    "Objective",
    "Outcome",
    "Task",
    "of_task",
    "outcome",
    "present",
    "terms",
    "touched",
]
