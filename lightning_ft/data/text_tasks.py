"""Tasks of texts, made by a function; of prompts and answers: what a language model adapts on, and is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.data.chat import require_template
from lightning_ft.data.collate import Segment, collate, targets_of
from lightning_ft.data.labels import Columns
from lightning_ft.data.number_tasks import NumberRows
from lightning_ft.data.pair_tasks import ComparedRows
from lightning_ft.data.rows import kind_of, wrong_columns
from lightning_ft.data.seq2seq_tasks import WrittenRows
from lightning_ft.data.sources import open_source
from lightning_ft.data.spans import Rendered, render_rows
from lightning_ft.data.tag_tasks import TagRows
from lightning_ft.data.task_functions import DrawnTasks, TextKind
from lightning_ft.data.token_rows import Truncation, cut
from lightning_ft.engine.episodes import Episode, Rows
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.seq2seq import start_id

Row = Mapping[str, Any]


class AnswerRows:
    """Rows of prompts and answers as one side of an episode.

    Args:
        tokenizer: of the model that learns.
        max_length: most tokens of a row; None: any.
        truncation: what happens to a longer one.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None, truncation: Truncation) -> None:
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation

    def question(self, row: Row) -> Any:
        """What of a row may not stand in support and query: all of it."""
        return row

    def side(self, rows: Sequence[Row], where: str) -> Rows:
        """Rows as one padded batch, whose targets are its scored tokens.

        Raises:
            Refusal: none of them can be learned from, or one is unfit.
        """
        segments = []
        for at, rendered in enumerate(self._rendered(rows, where)):
            if isinstance(rendered, Refusal):
                raise Refusal(f"{where}, row {at}: {rendered}")
            if (segment := self._fitted(rendered, at, where)) is not None:
                segments.append(segment)
        if not segments:
            raise Refusal(f"{where}: no row is left; rows that stand in the support do not count as query rows.")
        batch = collate(segments, packed=False)
        return Rows(batch, batch.labels, each="token")

    def _rendered(self, rows: Sequence[Row], where: str) -> list[Rendered | Refusal]:
        if not rows:
            return []
        kind = kind_of(rows[0])
        if kind is None:
            raise wrong_columns(where, rows[0])
        if kind == "messages":
            require_template(self.tokenizer)
        return render_rows(self.tokenizer, rows, kind)

    def _fitted(self, rendered: Rendered, at: int, where: str) -> Segment | None:
        ids, spans = np.array(rendered.ids), np.array(rendered.spans).reshape(-1, 2)
        if self.max_length is not None and len(ids) > self.max_length:
            if self.truncation == "drop":
                return None
            if self.truncation == "error":
                raise Refusal(
                    f"{where}, row {at} has {len(ids)} tokens, more than max_length {self.max_length}; raise it, or choose "
                    "truncation keep_end."
                )
            ids, spans = cut(ids, spans, self.max_length, self.truncation == "keep_end", self.tokenizer.bos_token_id)
        segment = Segment(ids=ids, spans=spans, row=at)
        if not len(targets_of(segment)):
            raise Refusal(
                f"{where}, row {at} has no token to learn within max_length {self.max_length}; raise it, or set truncation to "
                "keep_end, which cuts the prompt."
            )
        return segment


Reader = AnswerRows | WrittenRows | NumberRows | TagRows | ComparedRows


def reader_of(
    kind: TextKind,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation: Truncation,
    way: int | None,
    config: Any,
    judged: bool,
    columns: Columns | None = None,
) -> Reader:
    """What makes a side of an episode of rows.

    Args:
        kind: of the rows.
        tokenizer: of the base that learns.
        max_length: most tokens of a row; None: any.
        truncation: what happens to a longer one.
        way: how many tags a task may have; None: any number.
        config: of the base, which says whether an encoder reads what a decoder answers; None: it does not.
        judged: of pairs, whether rewards are learned.
        columns: of numbers and tags, where they stand; None: under their own names.
    """
    cuts: dict[str, Any] = {"max_length": max_length, "truncation": truncation}
    if kind == "numbers":
        named: dict[str, Any] = {"text": columns.text, "label": columns.label} if columns is not None else {}
        return NumberRows(tokenizer, **cuts, **named)
    if kind == "tags":
        named = {"words": columns.text, "tags": columns.label} if columns is not None else {}
        return TagRows(tokenizer, way=way, **cuts, **named)
    if kind == "pairs":
        return ComparedRows(tokenizer, judged=judged, **cuts)
    if getattr(config, "is_encoder_decoder", False):
        return WrittenRows(tokenizer, start=start_id(config), **cuts)
    return AnswerRows(tokenizer, **cuts)


class TextTasks:
    """The tasks of a split, tokenised.

    Args:
        drawn: gives each task as ``{"support": rows, "query": rows}``.
        rows: what makes a side of an episode of them.
    """

    def __init__(self, drawn: DrawnTasks, rows: Reader) -> None:
        self.drawn, self.rows = drawn, rows

    def episodes(self, epoch: int, numbers: np.ndarray) -> tuple[Episode, ...]:
        """These episodes of an epoch, one after the other."""
        return tuple(self._episode(self.drawn.task(epoch, number), number) for number in numbers.tolist())

    def _episode(self, task: Any, number: int) -> Episode:
        where = f"tasks {self.drawn.said!r}, task {number}"
        if not isinstance(task, Mapping) or not {"support", "query"} <= task.keys():
            raise Refusal(f"{where} must be a dictionary with support and query, lists of rows; it is {task!r:.80}.")
        support = list(task["support"])
        # What the model was adapted on says nothing about what it has learned to do.
        known = [self.rows.question(row) for row in support]
        query = [row for row in task["query"] if self.rows.question(row) not in known]
        sides = (("support", support), ("query", query))
        if isinstance(self.rows, TagRows):  # a tag has one number on both
            names = self.rows.names([*support, *query], where)
            return Episode(*(self.rows.side(rows, f"{where}, {side}", names) for side, rows in sides))
        return Episode(*(self.rows.side(rows, f"{where}, {side}") for side, rows in sides))


def rows_of_file(path: str, reader: Reader) -> tuple[Rows, list[str] | None]:
    """All rows of a file as one support set, and of tags their names in the order of their numbers.

    Args:
        path: JSON lines, CSV ... with the columns that the reader wants.
        reader: see `reader_of`.
    """
    rows = list(open_source(path, any_columns=True).rows())
    if isinstance(reader, TagRows):
        names = reader.names(rows, path)
        return reader.side(rows, path, names), names
    return reader.side(rows, path), None


__all__ = ["AnswerRows", "Reader", "TextTasks", "reader_of", "rows_of_file"]
