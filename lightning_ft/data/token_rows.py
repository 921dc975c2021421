"""Tokenised rows as loaders see them: which are kept, how they are cut, and an account of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from lightning_ft.data.collate import Segment
from lightning_ft.data.sources import Located
from lightning_ft.functional.errors import Refusal

Truncation = Literal["error", "drop", "keep_start", "keep_end"]
BadRows = Literal["error", "drop"]


@dataclass(frozen=True)
class Report:
    """What became of a data set.

    Attributes:
        name: of the source.
        rows: in the source.
        kept: rows that are used.
        tokens: in the rows kept, after truncation.
        scored: those of them that a loss counts.
        longest: tokens of the longest row kept.
        truncated: rows kept that were cut.
        dropped: reason -> rows left out.
        packing_efficiency: share of the positions computed that hold real tokens; None before batches are planned.
        epoch_rows: rows that an epoch takes, where that is not each of those kept once.
        parts: the accounts of the files, where there are several.
        facts: more about the rows kept, such as how many there are of each class.
    """

    name: str
    rows: int
    kept: int
    tokens: int
    scored: int
    longest: int
    truncated: int
    dropped: dict[str, int] = field(default_factory=dict)
    packing_efficiency: float | None = None
    epoch_rows: int | None = None
    parts: tuple[Report, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for people, and one for each part."""
        text = f"{self.name}: {self.kept:,} of {self.rows:,} rows, {self.tokens:,} tokens"
        text += f", {self.scored:,} scored" if self.scored else ""  # none where rows are learned as a whole
        text += f", longest {self.longest:,}"
        if self.epoch_rows is not None:
            text += f", {self.epoch_rows:,} rows an epoch"
        if self.truncated:
            text += f", {self.truncated:,} truncated"
        text += "".join(f", {count:,} dropped ({reason})" for reason, count in self.dropped.items())
        if self.packing_efficiency is not None:
            text += f", {self.packing_efficiency:.1%} of the positions hold tokens"
        text += "".join(f", {name}: {value}" for name, value in self.facts.items())
        return "\n  ".join([text, *map(str, self.parts)])


class Lists:
    """A column of lists read in place: views of the memory-mapped file, about a microsecond a row."""

    def __init__(self, column: Any) -> None:
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
        self._begins = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def __getitem__(self, row: int) -> np.ndarray:
        number = int(np.searchsorted(self._begins, row, side="right")) - 1
        offsets, values = self._chunks[number]
        place = row - int(self._begins[number])
        return values[offsets[place] : offsets[place + 1]]


@dataclass(frozen=True)
class TokenRows:
    """Rows ready to be dealt.

    Attributes:
        table: memory-mapped, see :func:`~lightning_ft.data.tokenise.tokenise`.
        index: (rows,) their numbers in the table, which are those in the source.
        lengths: (rows,) tokens after truncation.
        scored: (rows,) scored tokens after truncation.
        keep_end: whether a long row loses its beginning instead of its end.
        bos: the BOS id that a row which loses its beginning keeps, or None.
        report: the account.
    """

    table: Dataset
    index: np.ndarray
    lengths: np.ndarray
    scored: np.ndarray
    keep_end: bool
    bos: int | None
    report: Report

    def __len__(self) -> int:
        return len(self.index)

    @property
    def units(self) -> dict[str, np.ndarray]:
        """Unit -> (rows,) how many of it each row counts for in a loss; a row is one row where that is not said."""
        return {"token": self.scored}

    @property
    def widths(self) -> np.ndarray:
        """(rows,) tokens of the longest sequence that a row puts into a padded batch."""
        return self.lengths

    @property
    def copies(self) -> int:
        """Sequences that a row puts into a padded batch."""
        return 1

    def first(self, n: int) -> np.ndarray:
        """Places of the first ``n`` rows."""
        return np.arange(min(n, len(self)))

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[Segment]:
        """The rows at these places (from 0 to ``len(self) - 1``), cut as agreed."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) == 0:
            return []
        found = []
        for number in numbers.tolist():
            row = int(self.index[number])
            ids, spans = cut(*self._whole_row(row), int(self.lengths[number]), self.keep_end, self.bos)
            found.append(Segment(ids=ids, spans=spans, row=row))
        return found

    def _whole_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self._lists["ids"][row].astype(np.int64), self._lists["spans"][row].astype(np.int64).reshape(-1, 2)

    @cached_property
    def _lists(self) -> dict[str, Lists]:
        return {name: Lists(self.table.data.column(name)) for name in ("ids", "spans")}

    def subset(self, numbers: np.ndarray) -> TokenRows:
        """These rows alone; the report counts them, and what was dropped before the split."""
        lengths, scored = self.lengths[numbers], self.scored[numbers]
        report = replace(
            self.report,
            kept=len(numbers),
            tokens=int(lengths.sum()),
            scored=int(scored.sum()),
            longest=int(lengths.max(initial=0)),
            truncated=int((self._whole(numbers) > lengths).sum()),
        )
        return replace(self, index=self.index[numbers], lengths=lengths, scored=scored, report=report)

    def _whole(self, numbers: np.ndarray) -> np.ndarray:
        return self.table.data.column("length").to_numpy()[self.index[numbers]]


def select(
    table: Dataset,
    source: Located,
    *,
    max_length: int | None = None,
    truncation: Truncation = "error",
    bad_rows: BadRows = "error",
    bos: int | None = None,
) -> TokenRows:
    """Decides which tokenised rows are used and where they are cut.

    Args:
        table: from :func:`~lightning_ft.data.tokenise.tokenise`.
        source: to say where a row stands.
        max_length: most tokens a row may have; None: any number.
        truncation: what happens to longer rows: refuse, leave them out, keep their first tokens, or their last ones
            (and BOS, without which many models go astray).
        bad_rows: what happens to unfit rows, and to those from which truncation cut all that was to be learned.
        bos: the tokenizer's BOS id.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    whole = table.data.column("length").to_numpy().astype(np.int64)
    sieve = Sieve(source, len(whole), bad_rows)
    sieve.take_out(whole == 0, "unfit", lambda row, _: str(table[row]["problem"]))
    lengths, scored = sieve.within(whole, max_length, truncation), table.data.column("scored").to_numpy()
    long, keep_end = lengths < whole, truncation == "keep_end"
    if long.any() and max_length is not None:
        scored = _scored_after_cut(table, long, scored, max_length, keep_end, bos)
        sieve.take_out(
            scored == 0,
            "nothing left to learn after truncation",
            lambda row, n: (
                f"truncation to max_length {max_length} ({truncation}) leaves no token to learn of its {whole[row]}, as in "
                f"{n} rows: raise max_length, choose another truncation, or bad_rows drop."
            ),
        )
    index = sieve.left()
    rows = TokenRows(table, np.arange(len(whole)), lengths, scored.astype(np.int64), keep_end, bos, sieve.report())
    return rows.subset(index)


class Sieve:
    """Which rows of a source are used, by its policies, and an account of those that are not.

    Args:
        source: to say where a row stands.
        rows: how many it has.
        bad_rows: whether a row that is taken out is an error.
    """

    def __init__(self, source: Located, rows: int, bad_rows: BadRows) -> None:
        self._source = source
        self._bad_rows = bad_rows
        self._fit = np.ones(rows, dtype=bool)
        self._dropped: dict[str, int] = {}

    def take_out(self, bad: np.ndarray, reason: str, problem: Callable[[int, int], str]) -> None:
        """Takes bad rows out, or refuses the first of them.

        Args:
            bad: (rows,) bool.
            reason: for the account.
            problem: (the first of them, how many there are) -> what is wrong with it.
        """
        bad = bad & self._fit
        if not bad.any():
            return
        first, count = int(np.flatnonzero(bad)[0]), int(bad.sum())
        if self._bad_rows == "error":
            raise Refusal(f"{self._source.where(first)}: {problem(first, count)}")
        self._dropped[reason] = count
        self._fit &= ~bad

    def within(
        self, whole: np.ndarray, most: int | None, truncation: Truncation, argument: str = "max_length", of: str = ""
    ) -> np.ndarray:
        """(rows,) lengths of rows that may have at most so many tokens.

        Args:
            whole: (rows,) their lengths.
            most: the bound; None: any length.
            truncation: whether longer rows are refused, taken out or cut.
            argument: which one names the bound.
            of: what the tokens are those of, e.g. `` in its target``.
        """
        long = self._fit & (whole > (most if most is not None else np.iinfo(np.int64).max))
        if most is None or not long.any():
            return whole
        if truncation == "error":
            first = int(np.flatnonzero(long)[0])
            raise Refusal(
                f"{self._source.where(first)} has {int(whole[first])} tokens{of}, more than {argument} {most}, as have "
                f"{int(long.sum())} of {len(whole)} rows: raise {argument} (the longest has {int(whole.max())}) or "
                "choose truncation drop, keep_start or keep_end."
            )
        if truncation == "drop":
            self._dropped[f"longer than {most} tokens{of}"] = int(long.sum())
            self._fit &= ~long
            return whole
        return np.minimum(whole, most)

    def left(self) -> np.ndarray:
        """Numbers of the rows that are left, of which there is at least one."""
        index = np.flatnonzero(self._fit)
        if len(index) == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._dropped.items())
            raise Refusal(f"{self._source.name}: no row is left to use ({reasons}).")
        return index

    def report(self) -> Report:
        """The account, in which the rows that are left are still to be counted."""
        rows, dropped = len(self._fit), self._dropped
        return Report(self._source.name, rows=rows, kept=0, tokens=0, scored=0, longest=0, truncated=0, dropped=dropped)


def _scored_after_cut(
    table: Dataset, long: np.ndarray, scored: np.ndarray, max_length: int, keep_end: bool, bos: int | None
) -> np.ndarray:
    scored = scored.copy()
    ids, flat = Lists(table.data.column("ids")), Lists(table.data.column("spans"))
    for row in np.flatnonzero(long).tolist():
        _, spans = cut(ids[row], flat[row].reshape(-1, 2), max_length, keep_end, bos)
        scored[row] = int(np.maximum(spans[:, 1] - np.maximum(spans[:, 0], 1), 0).sum())
    return scored


def cut(
    ids: np.ndarray, spans: np.ndarray, length: int, keep_end: bool, bos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first or last ``length`` tokens and what remains of the spans; the last ones after the row's own BOS."""
    if len(ids) <= length:
        return ids, spans
    if not keep_end:
        kept, spans = ids[:length], np.minimum(spans, length)
    else:
        head = 1 if bos is not None and length > 1 and ids[0] == bos else 0
        shift = len(ids) - length
        kept = np.concatenate([ids[:head], ids[shift + head :]])
        spans = np.maximum(spans - shift, head)
    return kept, spans[spans[:, 1] > spans[:, 0]]
