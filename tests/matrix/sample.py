"""Which cells a session runs: all that are open, or a sample that has every value of every axis."""

from __future__ import annotations

import os
import random
from functools import cache

from tests.matrix import results
from tests.matrix.cells import AXES, Cell, cells, refusals

LEGAL, REFUSED, SEED = 44, 8, 0


@cache
def chosen() -> tuple[Cell, ...]:
    """The cells of this session."""
    if os.environ.get(results.WANTED) == "all":
        found, known = results.open_cells(cells()), results.latest()
        mixed = random.Random(SEED).sample(found, len(found))  # a run that is stopped has something of everything
        return tuple(sorted(mixed, key=lambda cell: cell.key in known))  # first those that were never run
    return tuple(sample())


def sample(legal: int = LEGAL, refused: int = REFUSED, seed: int = SEED) -> list[Cell]:
    """Cells that have each value of each axis, pairs of axes as far as they reach; the same for the same seed.

    Greedy: the cell that brings most values not yet seen, then most pairs of values; ties are broken by the seed.
    """
    draw = random.Random(seed)
    pool = {False: [], True: []}
    for cell in cells():
        pool[bool(refusals(cell))].append(cell)
    found = _cover(pool[False], legal, draw) + draw.sample(pool[True], min(refused, len(pool[True])))
    return sorted(found, key=lambda cell: cell.key)


def _cover(pool: list[Cell], count: int, draw: random.Random) -> list[Cell]:
    values = {cell: (_singles(cell), _pairs(cell)) for cell in draw.sample(pool, len(pool))}
    singles: set[object] = set()
    pairs: set[object] = set()
    found: list[Cell] = []
    while values and len(found) < count:
        best = max(values, key=lambda cell: (len(values[cell][0] - singles), len(values[cell][1] - pairs)))
        found.append(best)
        one, two = values.pop(best)
        singles |= one
        pairs |= two
    return found


def _singles(cell: Cell) -> set[object]:
    return {(axis, value) for axis, value in cell.values().items()}


def _pairs(cell: Cell) -> set[object]:
    values = list(cell.values().items())
    return {frozenset((one, other)) for n, one in enumerate(values) for other in values[n + 1 :]}


__all__ = ["AXES", "chosen", "sample"]
