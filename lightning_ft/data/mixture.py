"""Several files as one data set: which files a user means, which rows an epoch takes of each, and where a row is from.

With weights an epoch is a draw, and yet nothing here is stateful: the rows of a file stand in an endless sequence of
passes, each a permutation that depends on (seed, file, pass), and epoch ``e`` takes its next ``take`` rows. So no row
comes twice before all rows of its file have come once, all ranks agree, and a resumed run finds the same rows.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from lightning_ft.data.collate import Segment
from lightning_ft.data.plan import permutation
from lightning_ft.data.sources import Located
from lightning_ft.data.token_rows import Report, TokenRows
from lightning_ft.functional.errors import Refusal

Files: TypeAlias = str | list[str]
"""A file, a pattern, or several of them."""
WeightedFiles: TypeAlias = str | list[str] | dict[str, float]
"""The same, or files (patterns) with the share that each has in an epoch."""

_DRAW, _MIX = 5, 6  # random streams of their own, beside those of plan.py


class SizedSource(Located, Protocol):
    """One that knows how many rows it has."""

    def __len__(self) -> int:
        """Rows."""


@dataclass(frozen=True)
class Entry:
    """One thing that a user named.

    Attributes:
        name: as written.
        files: it alone, or what a pattern matches, sorted.
        weight: its share, to be divided by the sum of all; None where none has one.
    """

    name: str
    files: tuple[str, ...]
    weight: float | None


def entries_of(given: WeightedFiles, argument: str) -> tuple[Entry, ...]:
    """Which files are meant.

    Args:
        given: as the user wrote it.
        argument: its name, for messages.

    Raises:
        Refusal: nothing given, a pattern that matches nothing, one file twice, a weight that is not positive.
    """
    names: Sequence[str] = [given] if isinstance(given, str) else list(given)
    if not names:
        raise Refusal(f"{argument} is empty: give a file, a pattern such as 'shards/*.jsonl', or several.")
    entries = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise Refusal(f"{argument} holds {name!r}, which is not the name of a file: write each as a string.")
        weight = _weight(given[name], name, argument) if isinstance(given, Mapping) else None
        entries.append(Entry(name, _matching(name, argument), weight))
    seen: dict[str, str] = {}
    for entry in entries:
        for file in entry.files:
            same = os.path.realpath(os.path.expanduser(file)) if os.path.exists(os.path.expanduser(file)) else file
            if same in seen:
                again = f"by {seen[same]} and by {entry.name}" if seen[same] != entry.name else "twice"
                advice = "write {file: weight} to see its rows more often" if len(entries) > 1 else "name it once"
                raise Refusal(f"{argument} names the file {file} {again}: name it once, or {advice}.")
            seen[same] = entry.name
    return tuple(entries)


def _weight(value: object, name: str, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Refusal(f"{argument} gives {name} the weight {value!r}: a weight is a number greater than 0.")
    if value <= 0:
        raise Refusal(f"{argument} gives {name} the weight {value}: leave the file out, or give a weight above 0.")
    return float(value)


def _matching(name: str, argument: str) -> tuple[str, ...]:
    pattern = os.path.expanduser(name)
    if not any(sign in name for sign in "*?") or os.path.exists(pattern):
        return (name,)
    found = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    if not found:
        folder = Path(os.path.dirname(pattern.split("*")[0].split("?")[0]) or ".")
        why = f"the folder {folder} does not exist" if not folder.is_dir() else "no file matches it"
        raise Refusal(f"{argument} is the pattern {name}, but {why}; patterns start from {os.getcwd()}.")
    return tuple(found)


@dataclass(frozen=True)
class Shares:
    """What an epoch takes where it is not simply each row once.

    Attributes:
        sizes: rows of each entry; their numbers follow one another.
        takes: rows that an epoch takes of each.
    """

    sizes: tuple[int, ...]
    takes: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.takes)

    def rows(self, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """(len(self),) row numbers of one epoch in order; without ``shuffle`` entry after entry, each in file order."""
        pieces, offset = [], 0
        for number, (size, take) in enumerate(zip(self.sizes, self.takes, strict=True)):
            begin, end = epoch * take, (epoch + 1) * take
            first, last = begin // size, -(-end // size)
            passes = [
                permutation(size, (seed, _DRAW, number, which)) if shuffle else np.arange(size, dtype=np.int64)
                for which in range(first, last)
            ]
            if passes:
                pieces.append(np.concatenate(passes)[begin - first * size : end - first * size] + offset)
            offset += size
        rows = np.concatenate(pieces)
        return rows[permutation(len(rows), (seed, _MIX, epoch))] if shuffle else rows


def shares_of(names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], rows: int) -> Shares:
    """Divides an epoch of ``rows`` rows by weight: largest remainders, so that the parts add up exactly.

    Raises:
        Refusal: an entry whose share of so few rows is none.
    """
    exact = [rows * weight / math.fsum(weights) for weight in weights]
    takes = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (takes[i] - exact[i], i))
    for i in by_remainder[: rows - sum(takes)]:
        takes[i] += 1
    for name, take in zip(names, takes, strict=True):
        if take == 0:
            raise Refusal(
                f"{name} would give no row at all to an epoch of {rows} rows: raise its weight, or epoch_rows."
            )
    return Shares(tuple(sizes), tuple(takes))


@dataclass(frozen=True)
class MixedRows:
    """The rows of several files one after the other, as a loader sees them.

    Attributes:
        parts: of each file, at least one.
    """

    parts: tuple[TokenRows, ...]

    def __len__(self) -> int:
        return int(self._begins[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""
        return np.concatenate([part.lengths for part in self.parts])

    @cached_property
    def scored(self) -> np.ndarray:
        """(rows,) scored tokens of each row."""
        return np.concatenate([part.scored for part in self.parts])

    @cached_property
    def units(self) -> dict[str, np.ndarray]:
        """Unit -> (rows,) how many of it each row counts for."""
        found = [part.units for part in self.parts]
        return {unit: np.concatenate([units[unit] for units in found]) for unit in found[0]}

    @cached_property
    def widths(self) -> np.ndarray:
        """(rows,) tokens of the longest sequence of each row."""
        return np.concatenate([part.widths for part in self.parts])

    @property
    def copies(self) -> int:
        """Sequences a row."""
        return self.parts[0].copies

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum([0, *(len(part) for part in self.parts)])

    @cached_property
    def _source_begins(self) -> np.ndarray:
        return np.cumsum([0, *(part.report.rows for part in self.parts)])

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[Segment]:
        """The rows at these places; `Segment.row` counts on from file to file."""
        found = []
        for number in np.asarray(numbers, dtype=np.int64).tolist():
            which = int(np.searchsorted(self._begins, number, side="right")) - 1
            (segment,) = self.parts[which].segments([number - int(self._begins[which])])
            found.append(replace(segment, row=segment.row + int(self._source_begins[which])))
        return found

    def first(self, n: int) -> np.ndarray:
        """Places of the first rows, taken from the files in turn, so that a look at a few rows sees each of them."""
        begins, ends = self._begins[:-1], self._begins[1:]
        deepest = min(n, int((ends - begins).max()))
        turns = [begin + turn for turn in range(deepest) for begin, end in zip(begins, ends, strict=True)]
        kept = [turns[k] for k in range(len(turns)) if turns[k] < ends[k % len(ends)]]
        return np.array(kept[:n], dtype=np.int64)

    @cached_property
    def report(self) -> Report:
        """The account of all, with those of the files as its parts."""
        reports = [part.report for part in self.parts]
        dropped: dict[str, int] = {}
        for report in reports:
            for reason, count in report.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        return Report(
            name=f"{len(reports)} files",
            rows=sum(report.rows for report in reports),
            kept=sum(report.kept for report in reports),
            tokens=sum(report.tokens for report in reports),
            scored=sum(report.scored for report in reports),
            longest=max(report.longest for report in reports),
            truncated=sum(report.truncated for report in reports),
            dropped=dropped,
            parts=tuple(reports),
        )


@dataclass(frozen=True)
class MixedSource:
    """Where the rows of several files stand.

    Attributes:
        sources: of the files, in order.
    """

    sources: tuple[SizedSource, ...]

    @property
    def name(self) -> str:
        """All names."""
        return ", ".join(source.name for source in self.sources)

    def where(self, row: int) -> str:
        """File and line."""
        for source in self.sources:
            if row < len(source):
                return source.where(row)
            row -= len(source)
        raise IndexError(row)


def places_of(sources: Sequence[SizedSource]) -> Located:
    """Where the rows of `mixed` stand."""
    return sources[0] if len(sources) == 1 else MixedSource(tuple(sources))


def draw(entries: Sequence[Entry], rows: TokenRows | MixedRows, epoch_rows: int | None) -> Shares:
    """What an epoch takes.

    Args:
        entries: as the user named them; without weights all their rows are drawn together.
        rows: of all files of all entries, in this order.
        epoch_rows: how many; None: as many as there are.
    """
    parts = rows.parts if isinstance(rows, MixedRows) else (rows,)
    left = iter(parts)
    sizes = [sum(len(next(left)) for _ in entry.files) for entry in entries]
    names, weights = [entry.name for entry in entries], [entry.weight for entry in entries]
    if any(weight is None for weight in weights):
        names, sizes, weights = [", ".join(names)], [sum(sizes)], [1.0]
    return shares_of(names, sizes, [weight or 0.0 for weight in weights], epoch_rows or sum(sizes))


def refuse_overlap(train: Sequence[str], val: Sequence[str], name: str) -> None:
    """Refuses validation files that are among the training files.

    The same files in both are allowed: who writes them twice means it.
    """
    shared = sorted(set(train) & set(val))
    if shared and set(train) != set(val):
        raise Refusal(
            f"{name}.val_path holds {shared[0]}, which {name}.path holds too, so rows that are trained on would be "
            "validated on: take it out of one of them."
        )


def mixed(parts: Sequence[TokenRows]) -> TokenRows | MixedRows:
    """One file as it is, several as one."""
    return parts[0] if len(parts) == 1 else MixedRows(tuple(parts))
