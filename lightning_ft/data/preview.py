"""Rows as the model sees them: decoded pieces, each scored or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.collate import Segment, targets_of
from lightning_ft.data.sources import Source
from lightning_ft.data.token_rows import TokenRows


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are all scored, or all not.

    Attributes:
        text: decoded, special tokens written out.
        scored: whether a loss counts them.
        tokens: how many.
    """

    text: str
    scored: bool
    tokens: int


@dataclass(frozen=True)
class Preview:
    """One row, cut into pieces.

    Attributes:
        where: file and line.
        pieces: in order; their tokens are all those of the row.
    """

    where: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def scored(self) -> int:
        """Tokens that a loss counts."""
        return sum(piece.tokens for piece in self.pieces if piece.scored)


def preview_rows(rows: TokenRows, source: Source, tokenizer: PreTrainedTokenizerBase, n: int) -> list[Preview]:
    """The first ``n`` rows."""
    segments = rows.segments(np.arange(min(n, len(rows))))
    return [Preview(where=source.where(segment.row), pieces=pieces_of(segment, tokenizer)) for segment in segments]


def pieces_of(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A row cut where scored begins or ends."""
    flags = np.zeros(len(segment.ids), dtype=bool)
    flags[targets_of(segment)] = True
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    pieces = []
    for begin, end in zip(edges, edges[1:], strict=False):
        text = tokenizer.decode(segment.ids[begin:end].tolist(), skip_special_tokens=False)
        assert isinstance(text, str)
        pieces.append(Piece(text=text, scored=bool(flags[begin]), tokens=end - begin))
    return pieces
