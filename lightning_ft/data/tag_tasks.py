"""Words with a tag each as one side of an episode: what a base adapts to, and is measured on, where tasks are ways of tagging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.data.collate_labelled import LabelledSegment, collate_labelled
from lightning_ft.data.frames import Frame
from lightning_ft.data.labelled_rows import words_renderer
from lightning_ft.data.labels import TAG_COLUMNS
from lightning_ft.data.rows import type_in_words
from lightning_ft.data.token_rows import Truncation
from lightning_ft.engine.episodes import Rows
from lightning_ft.functional.errors import Refusal

_NONE = np.empty(0, dtype=np.int64)


class TagRows:
    """Rows of ``tokens`` (words) and ``tags``, tokenised; a word's tag is asked of its first token.

    Args:
        tokenizer: of the base that learns.
        max_length: most tokens of a row, special ones included; None: any.
        truncation: what happens to a longer one.
        way: how many tags a task may have; None: any number, whose names `names` then holds.
        words: column of the words.
        tags: column of the tags; None: ``tags``, ``ner_tags`` or ``labels``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None,
        truncation: Truncation,
        way: int | None,
        words: str = "tokens",
        tags: str | None = None,
    ) -> None:
        self.max_length, self.truncation, self.way = max_length, truncation, way
        self.words, self.tags = words, tags
        self.frame = Frame.of(tokenizer, pair=False)
        self._render = words_renderer(tokenizer, words, self.frame)

    def question(self, row: Mapping[str, Any]) -> Any:
        """What of a row may not stand in support and query: its words, whatever tags they have."""
        return row.get(self.words)

    def names(self, rows: Sequence[Mapping[str, Any]], where: str) -> list[str]:
        """The tags of rows: whole numbers stand for themselves, names are sorted.

        Raises:
            Refusal: a row without tags, or numbers beside names.
        """
        found = {tag for at, row in enumerate(rows) for tag in self._tags(row, f"{where}, row {at}")}
        if all(isinstance(tag, int) for tag in found):
            return [str(n) for n in range(max(found, default=-1) + 1 if self.way is None else self.way)]
        if not all(isinstance(tag, str) for tag in found):
            raise Refusal(f"{where}: tags must be all names or all whole numbers, found both.")
        return sorted(found)

    def side(self, rows: Sequence[Mapping[str, Any]], where: str, names: Sequence[str] | None = None) -> Rows:
        """Rows as one padded batch, whose targets are the numbers of their tags.

        Args:
            rows: what they are.
            where: for sentences.
            names: of the task's tags; None: those of the rows.

        Raises:
            Refusal: there are none, one is unfit, or its tags are not the task's.
        """
        names = self.names(rows, where) if names is None else names
        if self.way is not None and len(names) > self.way:
            raise Refusal(f"{where} has {len(names)} tags, and data.way is {self.way}; raise it.")
        numbers = {name: number for number, name in enumerate(names)}
        segments = []
        for at, (row, made) in enumerate(zip(rows, self._render([dict(row) for row in rows]), strict=True)):
            here = f"{where}, row {at}"
            if isinstance(made, Refusal):
                raise Refusal(f"{here}: {made}")
            segment = self._segment(made, self._numbers(row, numbers, here), at, here)
            if segment is not None:
                segments.append(segment)
        if not segments:
            raise Refusal(f"{where}: no row is left; rows whose words stand in the support do not count as query rows.")
        batch = collate_labelled(segments, packed=False)
        return Rows(batch, batch.labels, each="token")

    def _segment(self, made: Mapping[str, Any], classes: np.ndarray, row: int, where: str) -> LabelledSegment | None:
        ids, starts, words = (np.asarray(made[name], dtype=np.int64) for name in ("ids", "starts", "words"))
        room = len(ids) if self.max_length is None else self.max_length - self.frame.size
        if len(ids) > room:
            if self.truncation == "drop":
                return None
            if self.truncation == "error":
                raise Refusal(f"{where} is longer than max_length {self.max_length}; raise it, or choose keep_start.")
        begin = max(0, len(ids) - room) if self.truncation == "keep_end" else 0
        kept = ids[begin : begin + room]
        inside = (starts >= begin) & (starts < begin + len(kept))
        if not inside.any():
            raise Refusal(f"{where} has no tagged word within max_length {self.max_length}; raise it.")
        return LabelledSegment(
            ids=self.frame.ids(kept, _NONE),
            spans=_NONE.reshape(0, 2),
            row=row,
            types=self.frame.types_of(len(kept), 0),
            at=starts[inside] - begin + len(self.frame.before),
            classes=classes[words[inside]],
            target=None,
        )

    def _numbers(self, row: Mapping[str, Any], numbers: Mapping[str, int], where: str) -> np.ndarray:
        tags, words = self._tags(row, where), row[self.words]
        if len(tags) != len(words):
            raise Refusal(f"{where} has {len(words)} words and {len(tags)} tags; give each word one.")
        strange = [tag for tag in tags if str(tag) not in numbers]
        if strange:
            raise Refusal(f"{where} has the tag {strange[0]!r}, and the task's are {', '.join(numbers)}.")
        return np.array([numbers[str(tag)] for tag in tags], dtype=np.int64)

    def _tags(self, row: Mapping[str, Any], where: str) -> list[Any]:
        column = self.tags or next((name for name in TAG_COLUMNS if name in row), TAG_COLUMNS[0])
        tags = row.get(column)
        if not isinstance(tags, list) or not tags:
            raise Refusal(f"{where} needs a list of tags ({column}), found {type_in_words(tags)}.")
        for tag in tags:
            if isinstance(tag, bool) or not isinstance(tag, (int, str)) or (isinstance(tag, int) and tag < 0):
                raise Refusal(f"{where}: a tag is a name or a whole number from 0, found {tag!r:.40}.")
        return tags


__all__ = ["TagRows"]
