"""What continual learning asks of the rows of several tasks, whose trunk is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.task_list import OF_PAIRS
from lightning_ft.functional.fisher import Groups


def examples_of(batch: Batch, tasks: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """(S,) the example of each row of a batch, a pair of answers being one; and (S,) whether the row is its example's first."""
    first = torch.ones(len(batch.rows), dtype=torch.bool, device=batch.ids.device)
    for task in tasks:
        if task.objective in OF_PAIRS and (mine := batch.columns.get(f"rows/{task.number}")) is not None:
            first[mine[1::2]] = False
    return first.cumsum(0) - 1, first


def inside(batch: Batch, ask: Ask, example: Tensor, count: int) -> AbstractContextManager[None]:
    """Where the trunk sees the examples of a batch."""
    rows = Groups((len(example),), example, count)
    if batch.bounds is None:
        return ask.examples(rows)
    lengths = torch.tensor(batch.bounds, device=example.device).diff()
    return ask.examples(Groups((1, batch.bounds[-1]), example.repeat_interleave(lengths), count), rows)


def likelihood(
    batch: Batch,
    ask: Ask,
    tasks: Iterable[Any],
    heads: Mapping[str, nn.Module],
    view: Any,
    trunk: Callable[[], tuple[Tensor, Tensor]],
) -> Tensor:
    """What ``ask`` wants to know of each example, (E,): of all its scored tokens, its class or number, or which answer is better.

    Args:
        batch: with rows of any tasks.
        ask: what is asked.
        tasks: `lightning_ft.objectives.multitask.Task`, with the numbers that the batch gives them.
        heads: task -> its head, of those that have one.
        view: of the base, whose language head the others use.
        trunk: runs it: (S, D) a vector for each row, (T, D) all hidden states end to end.
    """
    tasks = list(tasks)
    example, first = examples_of(batch, tasks)
    keys = [key for key, begins in zip(ask.keys, first.tolist(), strict=True) if begins]
    ask.keys, count = keys, len(keys)
    with inside(batch, ask, example, count):
        rows, flat = trunk()
    total = torch.zeros(count, device=flat.device)

    def through(head: nn.Module, vectors: Tensor, owner: Tensor) -> Tensor:
        with ask.examples(Groups((len(vectors),), owner, count)):
            return head(vectors).float()  # type: ignore[no-any-return]

    for task in tasks:
        mine = batch.columns.get(f"rows/{task.number}")
        if mine is None:
            continue
        owner = example[mine]
        head = heads[task.name] if task.name in heads else None  # noqa: SIM401 (a ModuleDict has no get)
        if task.objective in ("causal_lm", "dpo", "token_classification"):
            places = batch.columns[f"scored/{task.number}"]
            if task.objective == "dpo":
                chosen = torch.zeros_like(first).index_fill(0, mine[::2], True)
                places = places[chosen[batch.segment_of_scored[places]]]
            whose, labels = example[batch.segment_of_scored[places]], batch.labels[places]
            hidden = flat.index_select(0, batch.scored[places])
            if head is None:
                total = total + ask.of_head(hidden, labels, whose, view)
            else:
                total = total + ask.of_logits(through(head, hidden, whose), labels, whose)
            continue
        assert head is not None
        logits = through(head, rows.index_select(0, mine), owner)
        if task.objective == "reward":
            none = mine.new_zeros(len(mine) // 2)
            total = total + ask.of_logits(logits.reshape(-1, 2), none, owner[::2])
            continue
        targets = batch.columns[f"targets/{task.number}"]
        if not targets.is_floating_point():
            total = total + ask.of_logits(logits, targets, owner)
            continue
        ask.keys = [keys[n] for n in owner.tolist()]  # numbers are drawn for each example by its key
        several = task.objective != "regression"
        found = ask.of_bits(logits, targets) if several else ask.of_values(logits, targets, 0.5)
        ask.keys = keys
        total = total.index_add(0, owner, found)
    return total


__all__ = ["likelihood"]
