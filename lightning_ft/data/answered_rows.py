"""Tokenised prompts with answers as loaders see them: pairs and single answers, cut as agreed, their lengths, shared prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from lightning_ft.data.collate_pairs import Answer, PairSegment, UnpairedSegment
from lightning_ft.data.token_rows import Lists, TokenRows

_NEAR = 16
"""Rows that are looked at for an answer to another prompt."""
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
        """The answer of the next row with another prompt, or at least of another row; None where there is none."""
        row = self._source_row(int(self.index[place]))
        near = np.roll(self.index, -place - 1)[: _NEAR + 1].tolist()
        others = [number for number in near if self._source_row(number) != row]
        mine = self._prompt(row)
        foreign = (n for n in others if not np.array_equal(self._prompt(self._source_row(n)), mine))
        chosen = next(foreign, others[0] if others else None)
        if chosen is None:
            return None
        return cut_answer(self._answer(self._source_row(chosen), self._which(chosen)), length)

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
