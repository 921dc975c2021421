"""Batches of a stream: one accumulation window looked ahead, a bounded number of rows held, and a place to resume at.

All ranks read, render and deal the same rows and keep their own, so that every rank knows the counts of all ranks
without a word between them; rendering costs each rank what it costs one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_ft.data.collate import Segment, collate, targets_of
from lightning_ft.data.loader import Collate, Placement
from lightning_ft.data.plan import pack_bins, plan_epoch
from lightning_ft.data.rows import Kind
from lightning_ft.data.spans import Rendered
from lightning_ft.data.stream import RawRow, RowId, Stream
from lightning_ft.data.token_rows import BadRows, Truncation, cut
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal

_CHUNK = 64  # rows rendered together where their number is not known beforehand
_BINS = 8  # bins filled together at least: with fewer the last ones, which are not full, weigh too much
_HOPELESS = 10_000  # rows left out one after another, after which none is expected to be fit


@dataclass(frozen=True)
class Mark:
    """A place in a stream, where a window begins.

    Attributes:
        micro: micro-batches of the epoch before it.
        next: the row that is read next.
        waiting: rows that were read before and are in no batch yet.
    """

    micro: int = 0
    next: RowId = (0, 0)
    waiting: tuple[RowId, ...] = ()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"micro": self.micro, "next": list(self.next), "waiting": [list(row) for row in self.waiting]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Mark:
        """From a checkpoint."""
        (which, index), waiting = state["next"], state["waiting"]
        return cls(state["micro"], (which, index), tuple((a, b) for a, b in waiting))


class Fitting:
    """Raw rows -> segments, by the rules for long and bad rows.

    Args:
        render: rows of one kind -> what became of each.
        max_length: most tokens of a row, or None.
        truncation: what happens to longer ones.
        bad_rows: what happens to those from which nothing can be learned.
        max_tokens: most tokens of a batch, or None.
        bos: the BOS id that a row which loses its beginning keeps.

    Attributes:
        dropped: reason -> rows left out so far.
    """

    def __init__(
        self,
        render: Callable[[Sequence[dict[str, Any]], Kind], Sequence[Rendered | Refusal]],
        *,
        max_length: int | None,
        truncation: Truncation,
        bad_rows: BadRows,
        max_tokens: int | None = None,
        bos: int | None = None,
    ) -> None:
        self.render = render
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.max_tokens = max_tokens
        self.bos = bos
        self.dropped: dict[str, int] = {}
        self._in_a_row = 0

    def __call__(self, raws: Sequence[RawRow]) -> list[Segment | None]:
        """The segment of each row, or None where it is left out.

        Raises:
            Refusal: an unfit or too long row, by file and line, where the rules say so; or a long run of rows that
                are all left out.
        """
        found = [self._fit(raw, result) for raw, result in zip(raws, rendered(raws, self.render), strict=True)]
        for segment in found:
            self._in_a_row = self._in_a_row + 1 if segment is None else 0
        if self._in_a_row >= _HOPELESS:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            raise Refusal(
                f"{raws[-1].where()}: this row and {self._in_a_row - 1:,} before it were all left out ({reasons}): see "
                "with bad_rows error and truncation error why."
            )
        return found

    def _fit(self, raw: RawRow, result: Rendered | Refusal) -> Segment | None:
        if isinstance(result, Refusal):
            problem = str(result).removeprefix(raw.where())  # a line that is no JSON names its place already
            problem = f"{raw.where()}: {problem}" if problem == str(result) else str(result)
            return self._left_out("unfit", problem, self.bad_rows == "drop")
        ids, spans = np.array(result.ids, dtype=np.int64), np.array(result.spans, dtype=np.int64).reshape(-1, 2)
        if self.max_length is not None and len(ids) > self.max_length:
            if self.truncation in ("error", "drop"):
                problem = (
                    f"{raw.where()} has {len(ids)} tokens, more than max_length {self.max_length}: raise max_length or "
                    "choose truncation drop, keep_start or keep_end."
                )
                return self._left_out(f"longer than {self.max_length} tokens", problem, self.truncation == "drop")
            whole = len(ids)
            ids, spans = cut(ids, spans, self.max_length, self.truncation == "keep_end", self.bos)
            if len(targets_of(Segment(ids, spans, 0))) == 0:
                problem = (
                    f"{raw.where()}: truncation to max_length {self.max_length} ({self.truncation}) leaves no token to "
                    f"learn of its {whole}: raise max_length, choose another truncation, or bad_rows drop."
                )
                return self._left_out("nothing left to learn after truncation", problem, self.bad_rows == "drop")
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise Refusal(
                f"{raw.where()} has {len(ids)} tokens and cannot go into a batch of max_tokens {self.max_tokens}: raise "
                "max_tokens, or lower max_length to at most max_tokens."
            )
        return Segment(ids=ids, spans=spans, row=raw.number)

    def _left_out(self, reason: str, problem: str, allowed: bool) -> Segment | None:
        if not allowed:
            raise Refusal(problem)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return None


def rendered(
    raws: Sequence[RawRow], render: Callable[[Sequence[dict[str, Any]], Kind], Sequence[Rendered | Refusal]]
) -> list[Rendered | Refusal]:
    """What became of each row: those of one kind are rendered together, and a line that is no JSON is a refusal too."""
    found: list[Rendered | Refusal | None] = [None] * len(raws)
    by_kind: dict[Kind, list[tuple[int, dict[str, Any]]]] = {}
    for number, raw in enumerate(raws):
        try:
            by_kind.setdefault(raw.file.kind, []).append((number, raw.columns()))
        except Refusal as refusal:
            found[number] = refusal
    for kind, rows in by_kind.items():
        for (number, _), result in zip(rows, render([row for _, row in rows], kind), strict=True):
            found[number] = result
    return [result for result in found if result is not None]


class StreamLoader:
    """Iterable over :class:`~lightning_ft.engine.batch.Batch`; each epoch goes on where the last one ended.

    Its length is what the run needs (``steps`` of the trainer), so that Lightning asks for a batch only when it trains
    on it; a stream itself has no end.

    Args:
        stream: the rows.
        fit: makes segments of them.
        batch_size: rows a micro-batch, where ``max_tokens`` is None.
        max_tokens: most tokens a micro-batch, by best fit over two windows, or eight micro-batches where these are more.
        packed: rows end to end, or padded and bucketed by length.
        placement: called when an epoch begins.
        steps: optimizer steps of the run, or None.
        begin: called when the first epoch begins: where a resumed run goes on; None: at the beginning.
        collate: makes a batch of segments.
    """

    def __init__(
        self,
        stream: Stream,
        fit: Fitting,
        *,
        batch_size: int,
        max_tokens: int | None = None,
        packed: bool = True,
        placement: Callable[[], Placement] = Placement,
        steps: Callable[[], int | None] = lambda: None,
        begin: Callable[[], Mark | None] = lambda: None,
        collate: Collate = collate,
    ) -> None:
        self.stream = stream
        self.fit = fit
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.packed = packed
        self.placement = placement
        self.steps = steps
        self.begin = begin
        self.collate = collate
        self._marks: tuple[Mark, ...] = ()
        self._pool: list[tuple[RowId, Segment]] = []

    @property
    def held(self) -> int:
        """Rows in memory now: those of the buffer and those rendered."""
        return self.stream.held + len(self._pool)

    def __len__(self) -> int:
        """Micro-batches of the run on each rank.

        Raises:
            TypeError: outside of a run: a stream has no length (Lightning expects this error).
        """
        steps = self.steps()
        if steps is None:
            raise TypeError("a stream has no length")
        return steps * self.placement().accumulate

    def mark(self, position: int) -> Mark:
        """The beginning of the window that holds micro-batch ``position``."""
        if not self._marks:
            self._marks = (self.begin() or Mark(),)
        return next((mark for mark in reversed(self._marks) if mark.micro <= position), self._marks[0])

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches of this rank; nothing is read before the first is asked for."""
        placement = self.placement()
        mark = self._first(placement.position)
        rows = self._rows_from(mark)
        while placement.limit is None or mark.micro < placement.limit:
            left = placement.accumulate if placement.limit is None else placement.limit - mark.micro
            batches, following = self._window(rows, mark, min(placement.accumulate, left), placement)
            self._marks = (mark, following)
            yield from itertools.islice(batches, max(0, placement.position - mark.micro), None)
            mark = following

    def _first(self, position: int) -> Mark:
        if not self._marks:
            self._marks = (self.begin() or Mark(),)
        last = self._marks[-1]
        if position == 0:  # an epoch begins, and the rows go on
            last = replace(last, micro=0)
            self._marks = (last,)
        if last.micro > position:
            raise Refusal(
                f"The stream is at micro-batch {last.micro} and cannot go back to {position}: start a new fit, or resume "
                "from a checkpoint."
            )
        return last

    def _rows_from(self, mark: Mark) -> Iterator[tuple[RowId, RawRow]]:
        """The order from a mark on; rows before it are read and left, those that wait go into the pool."""
        self._pool = []
        waiting = set(mark.waiting)
        rows = self.stream.rows(min([mark.next, *mark.waiting])[0])
        if mark.next[1] == 0 and not waiting:
            return rows
        found: dict[RowId, RawRow] = {}
        for number, row in rows:
            if number >= mark.next:
                rows = itertools.chain([(number, row)], rows)
                break
            if number in waiting:
                found[number] = row
        segments = self.fit([found[number] for number in mark.waiting])
        self._pool = [(number, segment) for number, segment in zip(mark.waiting, segments, strict=True) if segment]
        return rows

    def _window(
        self, rows: Iterator[tuple[RowId, RawRow]], mark: Mark, micro: int, placement: Placement
    ) -> tuple[list[Batch], Mark]:
        """The micro-batches of one window, and the mark after it."""
        pieces = micro * placement.world_size
        following = self._fill(rows, mark.next, pieces)
        lengths = np.array([len(segment.ids) for _, segment in self._pool])
        scored = np.array([len(targets_of(segment)) for _, segment in self._pool])
        if self.max_tokens is not None:
            bins = _fullest(pack_bins(lengths, self.max_tokens, shuffle=False), lengths, pieces)
            dealt = [bins[i : i + placement.world_size] for i in range(0, pieces, placement.world_size)]
            used = np.concatenate(bins)
            totals = {"token": float(scored[used].sum()), "row": float(len(used))}
        else:
            plan = plan_epoch(
                lengths,
                batch_size=self.batch_size,
                units={"token": scored},
                world_size=placement.world_size,
                accumulate=micro,
                shuffle=False,
                bucket=not self.packed,
            )
            dealt, totals, used = plan.micro, plan.window(0), np.arange(len(lengths))
        own = [[self._pool[place][1] for place in ranks[placement.rank]] for ranks in dealt]
        batches = [self.collate(part, packed=self.packed, window=totals, task=None) for part in own]
        gone = set(used.tolist())
        self._pool = [row for place, row in enumerate(self._pool) if place not in gone]
        return batches, Mark(mark.micro + micro, following, tuple(number for number, _ in self._pool))

    def _fill(self, rows: Iterator[tuple[RowId, RawRow]], following: RowId, pieces: int) -> RowId:
        """Renders rows until the pool is large enough for a window; returns which row comes next."""
        while True:
            if self.max_tokens is None:
                missing = pieces * self.batch_size - len(self._pool)
            else:  # more than the window, so that bins can be filled well; what is left waits for the next
                tokens = sum(len(segment.ids) for _, segment in self._pool)
                missing = _CHUNK if tokens < max(2 * pieces, _BINS) * self.max_tokens else 0
            if missing <= 0:
                return following
            taken = list(itertools.islice(rows, missing))
            following = (taken[-1][0][0], taken[-1][0][1] + 1)
            segments = self.fit([raw for _, raw in taken])
            self._pool += [(number, part) for (number, _), part in zip(taken, segments, strict=True) if part]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the mark. That it exists tells Lightning that we can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see ``state_dict``."""


def _fullest(bins: list[np.ndarray], lengths: np.ndarray, n: int) -> list[np.ndarray]:
    """The ``n`` fullest bins, among them the one with the oldest row, so that none waits for ever; oldest first."""
    oldest, *others = bins
    return sorted(
        [oldest, *sorted(others, key=lambda rows: -int(lengths[rows].sum()))[: n - 1]], key=lambda rows: int(rows[0])
    )
