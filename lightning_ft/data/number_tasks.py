"""Texts with a number each as one side of an episode: what a base adapts to, and is measured on, where tasks are regressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.data.collate_labelled import LabelledSegment, collate_labelled
from lightning_ft.data.frames import Frame
from lightning_ft.data.labels import real_number
from lightning_ft.data.prefixes import plain_ids
from lightning_ft.data.token_rows import Truncation
from lightning_ft.engine.episodes import Rows
from lightning_ft.functional.errors import Refusal

_NONE = np.empty(0, dtype=np.int64)


class NumberRows:
    """Rows of texts and numbers, tokenised.

    Args:
        tokenizer: of the base that learns.
        max_length: most tokens of a row, special ones included; None: any.
        truncation: what happens to a longer one.
        text: column of the text.
        label: column of the number.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None,
        truncation: Truncation,
        text: str = "text",
        label: str = "label",
    ) -> None:
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.text, self.label = text, label
        self.frame = Frame.of(tokenizer, pair=False)

    def question(self, row: Mapping[str, Any]) -> Any:
        """What of a row may not stand in support and query: its text, whatever number it has."""
        return row.get(self.text)

    def side(self, rows: Sequence[Mapping[str, Any]], where: str) -> Rows:
        """Rows as one padded batch, whose targets are their numbers.

        Raises:
            Refusal: there are none, or one is unfit.
        """
        read = [self._read(row, f"{where}, row {at}") for at, row in enumerate(rows)]
        ids = plain_ids(self.tokenizer, [text for text, _ in read])
        room = None if self.max_length is None else self.max_length - self.frame.size
        segments = []
        for at, (text, number) in enumerate(read):
            if room is not None and len(ids[text]) > room and self.truncation in ("error", "drop"):
                if self.truncation == "drop":
                    continue
                raise Refusal(
                    f"{where}, row {at} is longer than max_length {self.max_length}; raise it, or choose keep_start."
                )
            end = self.truncation == "keep_end"
            segments.append(text_segment(self.frame, ids[text], room, row=at, target=number, keep_end=end))
        if not segments:
            raise Refusal(f"{where}: no row is left; rows whose text stands in the support do not count as query rows.")
        batch = collate_labelled(segments, packed=False)
        assert batch.targets is not None
        return Rows(batch, batch.targets)

    def _read(self, row: Mapping[str, Any], where: str) -> tuple[str, float]:
        text = row.get(self.text)
        if not isinstance(text, str) or not text.strip():
            raise Refusal(f"{where} needs a text ({self.text}), found {text!r:.40}.")
        try:
            return text, real_number(row.get(self.label))
        except ValueError as problem:
            raise Refusal(f"{where}: {problem}") from None


def text_segment(
    frame: Frame, ids: Sequence[int], room: int | None, *, row: int, target: float | None = None, keep_end: bool = False
) -> LabelledSegment:
    """A text in its frame, cut to as many tokens of its own as there is room for (None: all)."""
    own = np.array(ids, dtype=np.int64)
    if room is not None and len(own) > room:
        own = own[len(own) - room :] if keep_end else own[:room]
    return LabelledSegment(
        ids=frame.ids(own, _NONE),
        spans=_NONE.reshape(0, 2),
        row=row,
        types=frame.types_of(len(own), 0),
        at=_NONE,
        classes=_NONE,
        target=None if target is None else np.asarray(target, dtype=np.float32),
    )


__all__ = ["NumberRows", "text_segment"]
