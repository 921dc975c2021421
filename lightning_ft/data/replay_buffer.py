"""Rows of earlier steps, kept by reservoir sampling: every row seen so far is in it with the same chance.

Algorithm R (Vitter, 1985): of a stream of rows the first M are kept; row number n (from 0) after that replaces a kept one, drawn
from all, with chance M / (n + 1). Balanced, each group (a class, a task) has a reservoir of its own, of M / groups rows; where a
new group comes, the others drop rows at random, which leaves each a uniform sample. All randomness is derived from (seed, what
was seen), so that nothing but rows and counters has to be saved, and all ranks agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_ft.data.batch_rows import Row

_REPLACE, _SHRINK, _DRAW = 1, 2, 3


def _uniform(below: int, *key: int) -> int:
    """A number below ``below`` that depends on the key alone."""
    return int(np.random.SeedSequence([number % 2**32 for number in key]).generate_state(1, np.uint64)[0] % below)


def _chosen(count: int, of: int, *key: int) -> list[int]:
    """``count`` different numbers below ``of``, ascending, by the key alone."""
    bits = np.random.PCG64(np.random.SeedSequence([number % 2**32 for number in key])).random_raw(of)
    return sorted(np.argsort(bits, kind="stable")[:count].tolist())


class ReplayBuffer:
    """The rows.

    Attributes:
        size: most rows, in all.
        seed: of all choices.
        groups: name of a group -> its rows; without balance one, ``""``.
        seen: name of a group -> rows of it that came by.
    """

    def __init__(self, size: int, seed: int) -> None:
        """Args: size: most rows; seed: of all choices."""
        self.size, self.seed = size, seed
        self.groups: dict[str, list[Row]] = {}
        self.seen: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.groups.values())

    @property
    def num_seen(self) -> int:
        """Rows that came by, in all."""
        return sum(self.seen.values())

    def add(self, row: Row, group: str = "") -> bool:
        """Offers a row; returns whether it was kept."""
        if group not in self.groups:
            self.groups[group], self.seen[group] = [], 0
            self._shrink()
        rows, number, quota = self.groups[group], self.seen[group], self._quota(group)
        self.seen[group] = number + 1
        if len(rows) < min(quota, number + 1):
            rows.append(row)
            return True
        at = _uniform(number + 1, self.seed, _REPLACE, self._index(group), number)
        if at >= quota:
            return False
        rows[at] = row
        return True

    def _index(self, group: str) -> int:
        return list(self.groups).index(group)

    def _quota(self, group: str) -> int:
        share, left = divmod(self.size, len(self.groups))
        return share + (self._index(group) < left)

    def _shrink(self) -> None:
        for number, (group, rows) in enumerate(self.groups.items()):
            quota = self._quota(group)
            if len(rows) > quota:
                kept = _chosen(quota, len(rows), self.seed, _SHRINK, number, self.num_seen)
                rows[:] = [rows[at] for at in kept]

    def draw(self, count: int, key: int, without: str | None = None) -> list[Row]:
        """So many different rows (all where there are fewer), by the key alone.

        Args:
            count: how many.
            key: of this draw, such as the optimizer step.
            without: a group that is left out.
        """
        rows = [row for group, found in self.groups.items() if group != without for row in found]
        return [rows[at] for at in _chosen(min(count, len(rows)), len(rows), self.seed, _DRAW, key)]

    def state(self) -> dict[str, Any]:
        """Rows and counters, plain types."""
        return {"groups": {name: list(rows) for name, rows in self.groups.items()}, "seen": dict(self.seen)}

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave; of one that was larger, as many rows as there is room for."""
        self.groups = {name: list(rows) for name, rows in state["groups"].items()}
        self.seen = {name: int(number) for name, number in state["seen"].items()}
        self._shrink()


def class_of(row: Row) -> str:
    """The class of a row: its target, or the last leaf of a user's row.

    Raises:
        ValueError: it has none.
    """
    target = row["segments"][0].get("target") if "segments" in row else _last_leaf(row["plain"])
    if target is None or target.ndim or target.is_floating_point():
        raise ValueError("no class")
    return str(int(target))


def _last_leaf(value: Any) -> Any:
    while isinstance(value, (list, tuple, dict)):
        value = list(value.values() if isinstance(value, dict) else value)[-1]
    return value


def shares(count: int, parts: int) -> list[slice]:
    """``count`` things in ``parts`` neighbouring pieces that differ by one at most."""
    edges = [count * n // parts for n in range(parts + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def placed(rows: Sequence[Row], micro: int, of: int, rank: int, ranks: int) -> list[Row]:
    """The rows that one micro-batch of a window takes on one rank."""
    return list(rows)[shares(len(rows), of * ranks)[micro * ranks + rank]]


__all__ = ["ReplayBuffer", "class_of", "placed", "shares"]
