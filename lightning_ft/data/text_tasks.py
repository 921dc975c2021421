"""Tasks of texts, made by a function; of prompts and answers: what a language model adapts on, and is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.data.chat import require_template
from lightning_ft.data.collate import Segment, collate, targets_of
from lightning_ft.data.number_tasks import NumberRows
from lightning_ft.data.rows import kind_of, wrong_columns
from lightning_ft.data.sources import open_source
from lightning_ft.data.spans import Rendered, render_rows
from lightning_ft.data.task_functions import DrawnTasks
from lightning_ft.data.token_rows import Truncation, cut
from lightning_ft.engine.episodes import Episode, Rows
from lightning_ft.functional.errors import Refusal

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
        return Rows(batch, batch.labels)

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


class TextTasks:
    """The tasks of a split, tokenised.

    Args:
        drawn: gives each task as ``{"support": rows, "query": rows}``.
        rows: what makes a side of an episode of them.
    """

    def __init__(self, drawn: DrawnTasks, rows: AnswerRows | NumberRows) -> None:
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
        return Episode(
            *(self.rows.side(rows, f"{where}, {side}") for side, rows in (("support", support), ("query", query)))
        )


def answer_rows(path: str, tokenizer: Any, *, max_length: int | None) -> Rows:
    """All rows of a file of prompts and answers as one support set.

    Args:
        path: JSON lines, CSV ... with the columns of `SFTData`.
        tokenizer: of the model that adapts.
        max_length: most tokens of a row; a longer one is refused.
    """
    return AnswerRows(tokenizer, max_length=max_length, truncation="error").side(list(open_source(path).rows()), path)


__all__ = ["AnswerRows", "TextTasks", "answer_rows"]
