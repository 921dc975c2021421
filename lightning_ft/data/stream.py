"""Rows of files that are too large to be tokenised first: read as they come, in an order that the seed decides.

The order is made of raw lines, and a row is parsed, rendered and tokenised only when its batch is made. So whoever
resumes can find a place in the order by reading alone. What is held at any time is the shuffle buffer and, for each open
file, one piece of it.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ft.data.json_text import read_line
from lightning_ft.data.mixture import Entry
from lightning_ft.data.plan import permutation
from lightning_ft.data.rows import Kind, kind_of, wrong_columns
from lightning_ft.data.sources import find_file, missing_file, refuse_magic
from lightning_ft.functional.errors import Refusal

_FILES, _BUFFER = 7, 8  # random streams of their own, beside those of plan.py and mixture.py
_OPEN = 32  # files read in turn at a time: enough to mix shards, far below the limit of open files
_PIECE = 256  # rows of a Parquet file that are decoded together
_BYTES = 1 << 16

RowId = tuple[int, int]
"""Which pass over the files, and which row of its order."""


@dataclass(frozen=True)
class RawRow:
    """A row as it was read.

    Attributes:
        file: which it comes from.
        place: its line (or row), from 1.
        offset: bytes of the file before it; 0 where unknown.
        content: its line, or its columns.
    """

    file: StreamFile
    place: int
    offset: int
    content: bytes | dict[str, Any]

    @property
    def number(self) -> int:
        """A number of its own among the rows of all files: for the first file the line, from 0."""
        return (self.file.number << 40) + self.place - 1

    def where(self) -> str:
        """File and line."""
        return f"{self.file.name}, {self.file.unit} {self.place}"

    def columns(self) -> dict[str, Any]:
        """The row.

        Raises:
            Refusal: a line that is not an object of JSON in UTF-8.
        """
        if isinstance(self.content, dict):
            return self.content
        read = read_line(self.file.name, self.place, self.content, self.offset)
        if read is None:
            raise Refusal(f"{self.where()} has only a byte-order mark.")
        return read[1]


@dataclass(frozen=True)
class StreamFile:
    """A file that can be read row by row, from the beginning, any number of times.

    Attributes:
        name: as the user wrote it.
        path: where it is.
        number: which it is, from 0.
        size: bytes.
    """

    name: str
    path: Path
    number: int
    size: int

    @property
    def unit(self) -> str:
        """What `RawRow.place` counts."""
        return "row" if self._is_parquet else "line"

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix.lower() == ".parquet"

    @cached_property
    def kind(self) -> Kind:
        """Of all rows, by the columns of the first."""
        first = next(self.rows(), None)
        if first is None:
            raise Refusal(f"{self.name} has no rows.")
        kind = kind_of(first.columns())
        if kind is None:
            raise wrong_columns(first.where(), first.columns())
        return kind

    @cached_property
    def key(self) -> str:
        """Hash of its size, its beginning and its end: to read all of it would take as long as an epoch."""
        with open(self.path, "rb") as handle:
            head = handle.read(_BYTES)
            handle.seek(max(0, self.size - _BYTES))
            return hashlib.sha256(b"%d|%s|%s" % (self.size, head, handle.read(_BYTES))).hexdigest()

    def rows(self) -> Iterator[RawRow]:
        """All rows in file order.

        Raises:
            Refusal: a file that breaks off or cannot be decompressed.
        """
        return self._parquet() if self._is_parquet else self._lines()

    def check(self) -> None:
        """Refuses what is not Parquet or JSON lines; reads the first bytes and the first row."""
        with open(self.path, "rb") as handle:
            head = handle.read(64)
        if self.path.suffix.lower() == ".gz":
            if not head.startswith(b"\x1f\x8b"):
                raise Refusal(f"{self.name} is not gzip data, as its name says: name it .jsonl.")
            head = next(self._lines(), RawRow(self, 1, 0, b"")).content[:64]  # type: ignore[index]
        refuse_magic(self.name, ".parquet" if self._is_parquet else ".jsonl", head)
        if head.lstrip()[:1] == b"[":
            raise Refusal(f"{self.name} is one JSON list, which cannot be read row by row: write it as JSON lines.")
        assert self.kind

    def _lines(self) -> Iterator[RawRow]:
        number, offset = 0, 0
        try:
            opened = gzip.open(self.path, "rb") if self.path.suffix.lower() == ".gz" else open(self.path, "rb")  # noqa: SIM115
            with opened as handle:
                for number, line in enumerate(handle, 1):  # noqa: B007 (said when the next one cannot be read)
                    if not line.isspace():
                        yield RawRow(self, number, offset, line)
                    offset += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise Refusal(f"{self.name} cannot be read on after line {number}: {error}.") from error

    def _parquet(self) -> Iterator[RawRow]:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet

        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for piece in file.iter_batches(batch_size=_PIECE, use_threads=False):
                    for row in piece.to_pylist():
                        number += 1
                        yield RawRow(self, number, 0, row)
        except (OSError, pa.ArrowException) as error:
            problem = str(error).splitlines()[0].rstrip(".")
            raise Refusal(f"{self.name} cannot be read as parquet after row {number}: {problem}.") from error


def open_stream_file(name: str, number: int) -> StreamFile:
    """A file to stream.

    Raises:
        Refusal: what cannot be read again from the beginning (a pipe, a data set of the hub), and what is no file of
            JSON lines, plain or gzip, and no Parquet file.
    """
    file, exists = find_file(name) if not name.startswith("starter:") else (Path(name), False)
    if not exists:
        if name.startswith("starter:"):
            raise Refusal(f"{name} is small and cannot be streamed: set streaming false.")
        if file.suffix.lower() not in (".jsonl", ".json", ".gz", ".parquet", ".txt") and name.count("/") == 1:
            raise Refusal(
                f"{name} is no file here, and a data set of the hub cannot be streamed, since its stream could not be resumed "
                "at the same row: download its files and name them, or set streaming false."
            )
        raise missing_file(name, file)
    if file.suffix.lower() in (".csv", ".tsv"):
        raise Refusal(f"{name} cannot be streamed: only JSON lines (plain or .gz) and Parquet can, so convert it.")
    opened = StreamFile(name, file, number, file.stat().st_size)
    try:
        opened.check()
    except OSError as error:
        raise Refusal(f"{name} cannot be read: {error.strerror or error}.") from error
    return opened


class Stream:
    """The rows of several files in one order without an end.

    Without weights the files are read to their ends, then again: that is a pass. With ``shuffle`` the files of a pass
    come in a new order, up to 32 are read in turn (each as often as its size suggests, so that they end together), and
    rows are drawn from a buffer. With weights each entry gives rows by its share and begins again when it ends, so that
    there is one pass only.

    Args:
        groups: the files of each entry.
        weights: share of each entry, or None.
        seed: of the order.
        shuffle: False: file after file.
        buffer: rows held to draw from.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[StreamFile]],
        weights: Sequence[float] | None,
        *,
        seed: int,
        shuffle: bool,
        buffer: int,
    ) -> None:
        self.groups = groups
        self.weights = weights
        self.seed = seed
        self.shuffle = shuffle
        self.buffer = buffer
        self._held: list[RawRow] = []

    @property
    def files(self) -> list[StreamFile]:
        """All of them."""
        return [file for group in self.groups for file in group]

    @property
    def held(self) -> int:
        """Rows in the buffer now."""
        return len(self._held)

    @property
    def key(self) -> str:
        """Hash that stands for the content."""
        return hashlib.sha256(repr([[file.key for file in group] for group in self.groups]).encode()).hexdigest()

    def rows(self, begin: int = 0) -> Iterator[tuple[RowId, RawRow]]:
        """The order from the beginning of a pass."""
        for which in itertools.count(begin):
            for index, row in enumerate(self._shuffled(self._pass(which), which)):
                yield (which, index), row

    def first(self, n: int) -> list[RawRow]:
        """The first rows of the files, taken from them in turn."""
        readers = [itertools.islice(file.rows(), n) for file in self.files[:n]]
        in_turn = (row for turn in itertools.zip_longest(*readers) for row in turn if row is not None)
        return list(itertools.islice(in_turn, n))

    def _pass(self, which: int) -> Iterator[RawRow]:
        if self.weights is None:
            return self._read(self.files, 0, which)
        endless = [self._again_and_again(group, number) for number, group in enumerate(self.groups)]
        return in_shares(zip(endless, self.weights, strict=True), at_once=len(endless))

    def _again_and_again(self, files: Sequence[StreamFile], group: int) -> Iterator[RawRow]:
        for which in itertools.count():
            yield from self._read(files, group, which)

    def _read(self, files: Sequence[StreamFile], group: int, which: int) -> Iterator[RawRow]:
        order: Iterable[int] = range(len(files))
        if self.shuffle:
            order = permutation(len(files), (self.seed, _FILES, group, which)).tolist()
        sized = ((files[number].rows(), float(files[number].size)) for number in order)
        return in_shares(sized, at_once=_OPEN if self.shuffle else 1)

    def _shuffled(self, rows: Iterator[RawRow], which: int) -> Iterator[RawRow]:
        if not self.shuffle:
            yield from rows
            return
        bits = _bits((self.seed, _BUFFER, which))
        held = self._held = []
        for row in rows:
            if len(held) < self.buffer:
                held.append(row)
                continue
            place = next(bits) * self.buffer >> 64
            held[place], row = row, held[place]
            yield row
        while held:
            place = next(bits) * len(held) >> 64
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()


def open_stream(entries: Sequence[Entry], *, seed: int, shuffle: bool, buffer: int) -> Stream:
    """Opens what a user named, see `lightning_ft.data.mixture.entries_of`.

    Raises:
        Refusal: see `open_stream_file`.
    """
    numbers = itertools.count()
    groups = [[open_stream_file(file, next(numbers)) for file in entry.files] for entry in entries]
    weights = [entry.weight for entry in entries if entry.weight is not None] or None
    return Stream(groups, weights, seed=seed, shuffle=shuffle, buffer=buffer)


def in_shares(readers: Iterable[tuple[Iterator[RawRow], float]], *, at_once: int) -> Iterator[RawRow]:
    """Merges readers, each as often as its share says (stride scheduling: after n rows none is off by more than a row).

    Args:
        readers: each with its share; the next joins when one has ended.
        at_once: how many are read in turn.
    """
    waiting = iter(enumerate(readers))
    heap = [(1 / share, number, rows, share) for number, (rows, share) in itertools.islice(waiting, at_once)]
    heapq.heapify(heap)
    while heap:
        clock, number, rows, share = heap[0]
        row = next(rows, None)
        if row is not None:
            heapq.heapreplace(heap, (clock + 1 / share, number, rows, share))
            yield row
            continue
        heapq.heappop(heap)
        for number, (rows, share) in itertools.islice(waiting, 1):
            heapq.heappush(heap, (clock + 1 / share, number, rows, share))


def _bits(key: tuple[int, ...]) -> Iterator[int]:
    generator = np.random.PCG64(np.random.SeedSequence(list(key)))
    while True:
        yield from generator.random_raw(1024).tolist()
