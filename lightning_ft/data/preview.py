"""Rows as the model sees them: decoded pieces, each scored or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.collate import Segment, targets_of
from lightning_ft.data.collate_pairs import Answer
from lightning_ft.data.mixture import MixedRows
from lightning_ft.data.sources import Located
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


def preview_rows(
    rows: TokenRows | MixedRows, source: Located, pieces: Callable[[Segment], list[Piece]], n: int
) -> list[Preview]:
    """The first ``n`` rows; of several files in turn."""
    segments = rows.segments(rows.first(n))
    return [Preview(where=source.where(segment.row), pieces=pieces(segment)) for segment in segments]


def pieces_of(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A row cut where scored begins or ends."""
    flags = np.zeros(len(segment.ids), dtype=bool)
    flags[targets_of(segment)] = True
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    return _pieces(segment.ids, edges, flags, tokenizer)


def answer_pieces(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """What follows a prompt, cut where scored begins or ends."""
    flags = np.zeros(len(answer.ids), dtype=bool)
    flags[answer.places] = True
    return _pieces(answer.ids, np.flatnonzero(flags[1:] != flags[:-1]) + 1, flags, tokenizer)


def pieces_between(ids: np.ndarray, places: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A row cut before and after each of some tokens, which are scored."""
    flags = np.zeros(len(ids), dtype=bool)
    flags[places] = True
    return _pieces(ids, np.union1d(places, places + 1), flags, tokenizer)


def _pieces(ids: np.ndarray, edges: np.ndarray, flags: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    cuts = [0, *(edge for edge in edges.tolist() if 0 < edge < len(ids)), len(ids)]
    pieces = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        assert isinstance(text, str)
        pieces.append(Piece(text=text, scored=bool(flags[begin]), tokens=end - begin))
    return pieces
