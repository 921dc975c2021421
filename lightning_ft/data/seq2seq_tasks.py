"""What an encoder reads and a decoder writes as one side of an episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.data.frames import Frame
from lightning_ft.data.prefixes import plain_ids
from lightning_ft.data.rows import text_in
from lightning_ft.data.seq2seq_rows import Seq2SeqSegment, collate_seq2seq, target_ids
from lightning_ft.data.token_rows import Truncation
from lightning_ft.engine.episodes import Rows
from lightning_ft.functional.errors import Refusal

_NONE = np.empty(0, dtype=np.int64)


class WrittenRows:
    """Rows of ``prompt`` and ``completion`` for an encoder-decoder.

    Args:
        tokenizer: of the model that learns.
        max_length: most tokens that are read, special ones included, and most that are written; None: any.
        truncation: what happens to longer ones: what is written always loses its end.
        start: the token that the decoder begins with.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None, truncation: Truncation, start: int) -> None:
        self.tokenizer, self.max_length, self.truncation, self.start = tokenizer, max_length, truncation, start
        self.frame = Frame.of(tokenizer, pair=False)
        if tokenizer.eos_token_id is None:
            raise Refusal("The tokenizer has no EOS token, so the model would never learn to stop: set its eos_token.")

    def question(self, row: Mapping[str, Any]) -> Any:
        """What of a row may not stand in support and query: all of it."""
        return row

    def side(self, rows: Sequence[Mapping[str, Any]], where: str) -> Rows:
        """Rows as one padded batch, whose targets are the tokens to write.

        Raises:
            Refusal: there are none, or one is unfit.
        """
        texts = []
        for at, row in enumerate(rows):
            try:
                texts.append((text_in(row, "prompt"), text_in(row, "completion")))
            except Refusal as refusal:
                raise Refusal(f"{where}, row {at}: {refusal}") from None
        read = plain_ids(self.tokenizer, [prompt for prompt, _ in texts])
        written = target_ids(self.tokenizer, [answer for _, answer in texts], self.tokenizer.eos_token_id)
        segments = []
        for at, ((prompt, _), target) in enumerate(zip(texts, written, strict=True)):
            source = read[prompt]
            longest = max(len(source) + self.frame.size, len(target))
            if self.max_length is not None and longest > self.max_length:
                if self.truncation == "drop":
                    continue
                if self.truncation == "error":
                    raise Refusal(
                        f"{where}, row {at} reads or writes {longest} tokens, more than max_length {self.max_length}; raise it, or "
                        "choose keep_start."
                    )
                room = max(0, self.max_length - self.frame.size)
                source = source[max(0, len(source) - room) :] if self.truncation == "keep_end" else source[:room]
                target = target[: self.max_length]
            segments.append(
                Seq2SeqSegment(
                    ids=np.array(target, dtype=np.int64),
                    spans=np.array([[0, len(target)]]),
                    row=at,
                    source=self.frame.ids(np.array(source, dtype=np.int64), _NONE),
                )
            )
        if not segments:
            raise Refusal(f"{where}: no row is left; rows that stand in the support do not count as query rows.")
        batch = collate_seq2seq(segments, start=self.start)
        return Rows(batch, batch.labels, each="token")


__all__ = ["WrittenRows"]
