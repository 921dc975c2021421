"""Episodes: small tasks with a support set to adapt on and a query set to be measured on, as data modules hand them over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch, Source

Move = Callable[[Tensor], Tensor]

# Not frozen, as `Batch`: Lightning writes into a copy what a precision such as 64-true converts.


@dataclass
class Rows:
    """One side of an episode.

    Attributes:
        inputs: (S, ...) numbers for a net, or a padded `Batch` of token rows for a base.
        targets: (S,) int64 classes from 0 to way - 1, or (S, ...) float values; of answers to write and of tags (N,) int64, the
            tokens and the tags; of pairs of answers (P,) zeros, the better one standing first, or for a policy (P, 2) how many
            tokens they have, and (P, 4) with their log-probabilities by the reference.
        each: what has a target: a row, a scored token, or a pair of rows.
    """

    inputs: Tensor | Batch
    targets: Tensor
    each: Literal["row", "token", "pair"] = "row"

    def apply(self, move: Move) -> Rows:
        """The same with every tensor replaced."""
        inputs = _applied(self.inputs, move) if isinstance(self.inputs, Batch) else move(self.inputs)
        return replace(self, inputs=inputs, targets=move(self.targets))


@dataclass
class Episode:
    """One task; support and query share no row.

    Attributes:
        support: what is adapted on.
        query: what the adapted model is measured on.
    """

    support: Rows
    query: Rows

    def apply(self, move: Move) -> Episode:
        """The same with every tensor replaced."""
        return Episode(self.support.apply(move), self.query.apply(move))


@dataclass
class MetaBatch:
    """The episodes of one micro-batch.

    Attributes:
        given: one after the other; or all in one, its tensors with a leading axis of episodes, where they are of one shape.
        counts: ``{"task": episodes of this micro-batch}``; 0 is a filler that makes ranks equal.
        window: the same summed over the accumulation window and all ranks; None when the loader does not know.
    """

    given: tuple[Episode, ...] | Episode
    counts: dict[str, float]
    window: dict[str, float] | None = None

    @property
    def stacked(self) -> Episode | None:
        """All in one, where they came so and there are any."""
        return self.given if isinstance(self.given, Episode) and self.counts["task"] else None

    def episodes(self) -> list[Episode]:
        """One after the other."""
        if isinstance(self.given, Episode):
            return [self.given.apply(lambda t, at=at: t[at]) for at in range(int(self.counts["task"]))]  # type: ignore[misc]
        return list(self.given)

    def apply(self, move: Move) -> MetaBatch:
        """The same with every tensor replaced."""
        given = self.given.apply(move) if isinstance(self.given, Episode) else tuple(e.apply(move) for e in self.given)
        return replace(self, given=given)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MetaBatch:
        """The same on a device; Lightning calls it."""
        return self.apply(lambda t: t.to(device, non_blocking=non_blocking))


def _applied(batch: Batch, move: Move) -> Batch:
    changed: dict[str, Any] = {
        one.name: move(value) for one in fields(batch) if isinstance(value := getattr(batch, one.name), Tensor)
    }
    if batch.source is not None:
        changed["source"] = Source(move(batch.source.ids), move(batch.source.mask))
    return replace(batch, **changed, columns={name: move(value) for name, value in batch.columns.items()})


__all__ = ["Episode", "MetaBatch", "Rows"]
