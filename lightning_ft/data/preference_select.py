"""Tokenised prompts with answers as loaders see them: which are kept, how they are cut, what sharing prompts saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from datasets import Dataset

from lightning_ft.data.collate_pairs import Answer, PairSegment, UnpairedSegment
from lightning_ft.data.sources import Located
from lightning_ft.data.token_rows import BadRows, Lists, Report, Sieve, TokenRows, Truncation

_Rows = TypeVar("_Rows", bound="AnsweredRows")


@dataclass(frozen=True)
class Kept:
    """What is left of each row of a source after truncation, (rows,) int64 each.

    Attributes:
        prompt: tokens of the prompt.
        answers: tokens of the first answer and of the second, 0 where there is none.
        scored: those of them that are scored.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, np.ndarray]
    scored: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class AnsweredRows(TokenRows):
    """Prompts with answers, ready to be dealt; made by a subclass's ``of``.

    Attributes:
        kept: what truncation leaves of the rows of the source.
        shared: whether a prompt that several answers follow is laid out once, by which ``lengths`` go.
    """

    kept: Kept
    shared: bool

    def sharing(self: _Rows, shared: bool, why_not: str | None = "") -> _Rows:
        """The same rows with prompts laid out once, or for each answer; lengths and the account follow.

        Args:
            shared: whether once.
            why_not: the reason where they are not, for the account; None: it is not known yet.
        """
        rows = replace(self, shared=shared)
        rows = replace(rows, lengths=rows._lengths())
        once, whole = (int(replace(self, shared=how)._lengths().sum()) for how in (True, False))
        facts = dict(self.report.facts)
        if whole > once:
            saved = f"{whole - once:,} of {whole:,} tokens ({1 - once / whole:.0%})"
            if shared:
                facts["prompts laid out once"] = f"saves {saved}"
            elif why_not is None:
                facts["prompts laid out once"] = f"where the model is proven to see them, which saves {saved}"
            else:
                because = f", but {why_not}" if why_not else ""
                facts["prompts laid out for each answer"] = f"sharing them would save {saved}{because}"
        tokens, longest = int(rows.lengths.sum()), int(rows.lengths.max(initial=0))
        return replace(rows, report=replace(rows.report, tokens=tokens, longest=longest, facts=facts))

    def _lengths(self) -> np.ndarray:
        """(rows,) tokens that each row takes in a packed batch."""
        raise NotImplementedError

    def _prompt(self, row: int) -> np.ndarray:
        """A row's prompt; one that loses its beginning keeps its BOS."""
        whole, kept = int(self._whole_prompts[row]), int(self.kept.prompt[row])
        ids = self._columns["ids"][row][:whole].astype(np.int64)
        if kept == whole or not self.keep_end:
            return ids[:kept]
        head = 1 if self.bos is not None and kept > 1 and ids[0] == self.bos else 0
        return np.concatenate([ids[:head], ids[whole - kept + head :]])

    def _answer(self, row: int, which: int) -> Answer:
        begin = int(self._whole_prompts[row]) + (int(self._firsts[row]) if which else 0)
        ids, flat, border = self._columns["ids"][row], self._columns["spans"][row], int(self._first_spans[row])
        spans = (flat[border:] if which else flat[:border]).astype(np.int64).reshape(-1, 2)
        return cut_answer(Answer(ids[begin:], spans), int(self.kept.answers[which][row]))

    @cached_property
    def _columns(self) -> dict[str, Lists]:
        return {name: Lists(self.table.data.column(name)) for name in ("ids", "spans")}

    @cached_property
    def _whole_prompts(self) -> np.ndarray:
        return self.table.data.column("prompt").to_numpy()

    @cached_property
    def _firsts(self) -> np.ndarray:
        return self.table.data.column("first").to_numpy()

    @cached_property
    def _first_spans(self) -> np.ndarray:
        return self.table.data.column("first_spans").to_numpy()

    @cached_property
    def values(self) -> np.ndarray:
        """(rows of the source,) float32, margin or label of each."""
        return self.table.data.column("value").to_numpy()


@dataclass(frozen=True)
class PairRows(AnsweredRows):
    """Pairs ready to be dealt.

    Attributes:
        margins: whether they have margins.
    """

    margins: bool

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[PairSegment]:  # type: ignore[override]
        """The pairs at these places (from 0 to ``len(self) - 1``), cut as agreed."""
        return [self._pair(int(self.index[n])) for n in np.asarray(numbers, dtype=np.int64).tolist()]

    def _pair(self, row: int) -> PairSegment:
        prompt, chosen, rejected = self._prompt(row), self._answer(row, 0), self._answer(row, 1)
        return PairSegment(
            ids=np.concatenate([prompt, chosen.ids]),
            spans=chosen.spans + len(prompt),
            row=row,
            prompt=len(prompt),
            rejected=rejected,
            margin=float(self.values[row]) if self.margins else None,
        )

    @property
    def units(self) -> dict[str, np.ndarray]:
        """What each pair counts, see `collate_pairs`."""
        one = np.ones(len(self), dtype=np.int64)
        return {"token": self.scored, "chosen_token": self.kept.scored[0][self.index], "row": 2 * one, "pair": one}

    @property
    def widths(self) -> np.ndarray:
        """(rows,) tokens of the prompt with the longer answer."""
        longer = np.maximum(*self.kept.answers)
        return (self.kept.prompt + longer)[self.index]

    @property
    def copies(self) -> int:
        """Both answers."""
        return 2

    def _lengths(self) -> np.ndarray:
        prompts = self.kept.prompt * (1 if self.shared else 2)
        return (prompts + self.kept.answers[0] + self.kept.answers[1])[self.index]

    def _whole(self, numbers: np.ndarray) -> np.ndarray:
        rows = self.index[numbers]
        whole = self.table.data.column("length").to_numpy()[rows].astype(np.int64)
        return whole + (0 if self.shared else self._whole_prompts[rows])


@dataclass(frozen=True)
class UnpairedRows(AnsweredRows):
    """Single answers ready to be dealt; the two answers of a pair are rows 2i and 2i + 1.

    Attributes:
        paired: whether the table holds pairs.
        mismatched: whether each answer also comes behind another prompt.
    """

    paired: bool
    mismatched: bool

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[UnpairedSegment]:  # type: ignore[override]
        """The answers at these places (from 0 to ``len(self) - 1``), cut as agreed."""
        places = np.asarray(numbers, dtype=np.int64).tolist()
        found = [self._segment(int(self.index[place])) for place in places]
        if self.mismatched and len(found) == 1:
            found = [replace(found[0], neighbour=self._neighbour(places[0], len(found[0].answer.ids)))]
        return found

    def _segment(self, number: int) -> UnpairedSegment:
        row, which = self._source_row(number), self._which(number)
        prompt, answer = self._prompt(row), self._answer(row, which)
        return UnpairedSegment(
            ids=np.concatenate([prompt, answer.ids]),
            spans=answer.spans + len(prompt),
            row=number,
            prompt=len(prompt),
            desirable=bool(self.desirable(np.array([number]))[0]),
        )

    def _neighbour(self, place: int, length: int) -> Answer | None:
        """The answer of the next row of another prompt; None where there is none."""
        row = self._source_row(int(self.index[place]))
        for other in np.roll(self.index, -place - 1)[:3].tolist():  # after at most the other answer to this prompt
            if self._source_row(other) != row:
                return cut_answer(self._answer(self._source_row(other), self._which(other)), length)
        return None

    def desirable(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) bool labels of these numbers of the data set."""
        return numbers % 2 == 0 if self.paired else self.values[numbers] > 0.5

    def source_rows(self) -> np.ndarray:
        """(rows,) where each stands in the table."""
        return self.index // 2 if self.paired else self.index

    def _source_row(self, number: int) -> int:
        return number // 2 if self.paired else number

    def _which(self, number: int) -> int:
        return number % 2 if self.paired else 0

    @property
    def units(self) -> dict[str, np.ndarray]:
        """What each answer counts, see `collate_unpaired`."""
        return {"token": self.scored, "row": np.ones(len(self), dtype=np.int64)}

    @property
    def widths(self) -> np.ndarray:
        """(rows,) tokens of the prompt with its answer."""
        return self._prompts() + self._answers()

    @property
    def copies(self) -> int:
        """The answer, and one that is not its own, taken to be as long."""
        return 1 + self.mismatched

    def _lengths(self) -> np.ndarray:
        own = self._prompts() + self._answers()
        if not self.mismatched:
            return own
        return own + self._answers() if self.shared else 2 * own

    def _prompts(self) -> np.ndarray:
        return self.kept.prompt[self.source_rows()]

    def _answers(self) -> np.ndarray:
        return self._pick(self.kept.answers)

    def _pick(self, both: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        rows = self.source_rows()
        return np.where(self.index % 2 == 0, both[0][rows], both[1][rows]) if self.paired else both[0][rows]

    def _whole(self, numbers: np.ndarray) -> np.ndarray:
        # Only compared with `lengths`, by how much is cut: so what is cut is added to these.
        rows = self.source_rows()[numbers]
        columns = self.table.data
        whole = columns.column("prompt").to_numpy()[rows].astype(np.int64)
        first, second = (columns.column(name).to_numpy()[rows].astype(np.int64) for name in ("first", "second"))
        whole += np.where(self.index[numbers] % 2 == 0, first, second) if self.paired else first
        return self.lengths[numbers] + (whole > self.widths[numbers])


def cut_answer(answer: Answer, length: int) -> Answer:
    """The first tokens of an answer, and what remains of its spans."""
    spans = np.minimum(answer.spans, length)
    return Answer(answer.ids[:length].astype(np.int64), spans[spans[:, 1] > spans[:, 0]])


def select_pairs(
    table: Dataset,
    source: Located,
    *,
    max_length: int | None,
    truncation: Truncation,
    bad_rows: BadRows,
    bos: int | None,
    margins: bool,
) -> PairRows:
    """Decides which pairs are used and where they are cut.

    Args:
        table: from :func:`~lightning_ft.data.preference_tokens.tokenise_exchanges`.
        source: to say where a row stands.
        max_length: most tokens that the prompt may have with either answer; None: any number.
        truncation: what happens to longer ones. ``keep_start`` cuts the ends of the answers, ``keep_end`` the beginning of the
            prompt, the same for both.
        bad_rows: what happens to unfit rows, to two answers that are the same or become so when cut, and to answers of which
            truncation leaves nothing to learn.
        bos: the tokenizer's BOS id, which a prompt keeps.
        margins: whether the rows have margins.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    kept, index, report = _sift(table, source, max_length, truncation, bad_rows, paired=True)
    scored = (kept.scored[0] + kept.scored[1])[index]
    none = np.zeros(len(index), dtype=np.int64)
    rows = PairRows(table, index, none, scored, truncation == "keep_end", bos, report, kept, False, margins)
    return replace(rows, lengths=rows._lengths()).subset(np.arange(len(index)))  # type: ignore[return-value]


def select_unpaired(
    table: Dataset,
    source: Located,
    *,
    max_length: int | None,
    truncation: Truncation,
    bad_rows: BadRows,
    bos: int | None,
    paired: bool,
    mismatched: bool,
) -> UnpairedRows:
    """Decides which single answers are used and where they are cut; see `select_pairs`.

    Args:
        table: from :func:`~lightning_ft.data.preference_tokens.tokenise_exchanges`.
        source: to say where a row stands.
        max_length: most tokens that a prompt may have with its answer; None: any number.
        truncation: what happens to longer ones.
        bad_rows: what happens to unfit rows.
        bos: the tokenizer's BOS id.
        paired: whether the table holds pairs, of which each answer becomes a row.
        mismatched: whether each answer also comes behind another prompt.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    kept, index, report = _sift(table, source, max_length, truncation, bad_rows, paired=paired)
    if paired:
        index = (2 * index[:, None] + np.arange(2)).reshape(-1)
        dropped = {reason: 2 * count for reason, count in report.dropped.items()}
        report = replace(report, rows=2 * report.rows, dropped=dropped)
    none = np.zeros(len(index), dtype=np.int64)
    keep_end = truncation == "keep_end"
    rows = UnpairedRows(table, index, none, none, keep_end, bos, report, kept, False, paired, mismatched)
    rows = replace(rows, lengths=rows._lengths(), scored=rows._pick(kept.scored))
    return rows.subset(np.arange(len(index)))  # type: ignore[return-value]


def _sift(
    table: Dataset, source: Located, max_length: int | None, truncation: Truncation, bad_rows: BadRows, *, paired: bool
) -> tuple[Kept, np.ndarray, Report]:
    """What is left of each row, the numbers of those that are used, and the account so far."""
    names = ("length", "prompt", "first", "second", "first_scored", "second_scored", "same")
    whole, prompt, first, second, first_scored, second_scored, same = (
        table.data.column(name).to_numpy().astype(np.int64) for name in names
    )
    sieve = Sieve(source, len(whole), bad_rows)
    sieve.take_out(whole == 0, "unfit", lambda row, _: str(table[row]["problem"]))
    if paired:
        sieve.take_out(
            same == 1,
            "chosen and rejected are the same",
            lambda row, n: (
                f"chosen and rejected are the same tokens, as in {_count(n)}: such a pair teaches nothing; take it out, or set "
                "bad_rows drop."
            ),
        )
    longer = np.maximum(first, second)
    most = sieve.within(
        prompt + longer, max_length, truncation, of=" in its prompt and longer answer" if paired else ""
    )
    long = (most < prompt + longer) & (whole > 0)
    kept = Kept(prompt, (first, second), (first_scored, second_scored))
    if not long.any() or max_length is None or truncation not in ("keep_start", "keep_end"):
        return kept, sieve.left(), sieve.report()
    if truncation == "keep_end":
        room = max_length - longer
        sieve.take_out(
            long & (room < 1),
            "an answer without room for its prompt",
            lambda row, n: (
                f"an answer alone has {longer[row]} tokens, which leaves its prompt no room in max_length {max_length}, as in "
                f"{_count(n)}: raise max_length, or set truncation keep_start or bad_rows drop."
            ),
        )
        kept = Kept(np.where(long, np.maximum(room, 1), prompt), kept.answers, kept.scored)
        return kept, sieve.left(), sieve.report()
    left = np.maximum(max_length - prompt, 0)
    answers = tuple(np.where(long, np.minimum(one, left), one) for one in (first, second))
    kept, alike = _cut(table, Kept(np.where(long, np.minimum(prompt, max_length), prompt), answers, kept.scored), long)  # type: ignore[arg-type]
    empty = (kept.scored[0] == 0) | ((kept.scored[1] == 0) & paired)
    sieve.take_out(
        long & empty,
        "nothing left to learn after truncation",
        lambda row, n: (
            f"truncation to max_length {max_length} (keep_start) leaves an answer no token to learn, as in {_count(n)}: raise "
            "max_length, choose another truncation, or bad_rows drop."
        ),
    )
    if paired:
        sieve.take_out(
            long & alike,
            "chosen and rejected are the same after truncation",
            lambda row, n: (
                f"truncation to max_length {max_length} (keep_start) makes chosen and rejected the same, as in {_count(n)}: raise "
                "max_length, choose another truncation, or bad_rows drop."
            ),
        )
    return kept, sieve.left(), sieve.report()


def _cut(table: Dataset, kept: Kept, long: np.ndarray) -> tuple[Kept, np.ndarray]:
    """The scored tokens of cut answers, and where both answers are the same now."""
    scored = (kept.scored[0].copy(), kept.scored[1].copy())
    alike = np.zeros(len(long), dtype=bool)
    empty = Report("", 0, 0, 0, 0, 0, 0)
    none = np.zeros(len(long), dtype=np.int64)
    rows = AnsweredRows(table, none, none, none, False, None, empty, kept, False)
    for row in np.flatnonzero(long).tolist():
        answers = [rows._answer(row, which) for which in range(2)]
        for which, answer in enumerate(answers):
            scored[which][row] = len(answer.places)
        alike[row] = np.array_equal(answers[0].ids, answers[1].ids)
    return replace(kept, scored=scored), alike


def _count(n: int) -> str:
    return f"{n} rows" if n != 1 else "1 row"
