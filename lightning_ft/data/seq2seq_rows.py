"""Prompts and completions as what an encoder reads and a decoder writes: tokenised once, cut and laid out when dealt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.collate import FILLER, Layout, Segment, joined, real_rows
from lightning_ft.data.frames import Frame
from lightning_ft.data.prefixes import plain_ids
from lightning_ft.data.rows import text_in
from lightning_ft.data.sources import Source
from lightning_ft.data.token_rows import BadRows, Lists, Sieve, TokenRows, Truncation
from lightning_ft.data.tokenise import cached_rows
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.batch import Source as EncoderRows
from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Seq2SeqSegment(Segment):
    """One tokenised row; ``ids`` are those to write, end token included.

    Attributes:
        source: (T,) ids to read.
    """

    source: np.ndarray


def tokenise_seq2seq(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completion: str,
    prefix: str,
    *,
    keep_bad_rows: bool,
    cache_dir: str | Path | None,
) -> Dataset:
    """Tokenises prompts and completions, or finds them tokenised.

    Args:
        source: the rows.
        tokenizer: of a sequence-to-sequence model.
        prompt: column of what is read.
        completion: column of what is written.
        prefix: put before each prompt.
        keep_bad_rows: put the reason into the column ``problem`` instead of raising at the first unfit row.
        cache_dir: folder of the cache.

    Returns:
        One row for each of the source: ``ids`` of the prompt without special tokens, ``target`` with its end token,
        ``written`` (its length), and ``length``: of the target and the prompt with its special tokens.

    Raises:
        Refusal: an unfit row, a tokenizer without an end token, or no room on the disk.
    """
    frame, eos = Frame.of(tokenizer, pair=False), tokenizer.eos_token_id
    if eos is None:
        raise Refusal("The tokenizer has no EOS token, so the model would never learn to stop: set its eos_token.")

    def render(rows: list[dict[str, Any]]) -> list[Mapping[str, Any] | Refusal]:
        texts: list[tuple[str, str] | Refusal] = []
        for row in rows:
            try:
                texts.append((prefix + text_in(row, prompt), text_in(row, completion)))
            except Refusal as refusal:
                texts.append(refusal)
        good = [pair for pair in texts if not isinstance(pair, Refusal)]
        read = plain_ids(tokenizer, (text for text, _ in good))
        written = iter(target_ids(tokenizer, [text for _, text in good], eos))
        made: list[Mapping[str, Any] | Refusal] = []
        for pair in texts:
            if isinstance(pair, Refusal):
                made.append(pair)
                continue
            ids, target = read[pair[0]], next(written)
            made.append(
                {"ids": ids, "target": target, "written": len(target), "length": len(ids) + frame.size + len(target)}
            )
        return made

    own = {"target": datasets.Sequence(datasets.Value("int32")), "written": datasets.Value("int32")}
    about = {"kind": "seq2seq", "prompt": prompt, "completion": completion, "prefix": prefix}
    return cached_rows(source, tokenizer, render, own, about, keep_bad_rows=keep_bad_rows, cache_dir=cache_dir)


def target_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], eos: int) -> list[list[int]]:
    """The tokens of answers as a decoder writes them, each with its end token."""
    if not texts:
        return []
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    found = tokenizer(text_target=list(texts), **options)["input_ids"]
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in found]


@dataclass(frozen=True)
class Seq2SeqRows(TokenRows):
    """Rows ready to be dealt; ``lengths`` count both sides.

    Attributes:
        frame: the special tokens around what is read.
        read: (rows of the source,) tokens that the encoder gets, after truncation.
    """

    frame: Frame
    read: np.ndarray

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[Seq2SeqSegment]:  # type: ignore[override]
        """The rows at these places (from 0 to ``len(self) - 1``), cut as agreed."""
        return [self._segment(int(self.index[n]), int(self.scored[n])) for n in np.asarray(numbers).tolist()]

    def _segment(self, row: int, written: int) -> Seq2SeqSegment:
        ids, room = self._columns["ids"][row], int(self.read[row]) - self.frame.size
        kept = ids[len(ids) - room :] if self.keep_end else ids[:room]
        none = np.empty(0, dtype=np.int64)
        target = self._columns["target"][row][:written].astype(np.int64)
        return Seq2SeqSegment(ids=target, spans=np.array([[0, written]]), row=row, source=self.frame.ids(kept, none))

    @cached_property
    def _columns(self) -> dict[str, Lists]:
        return {name: Lists(self.table.data.column(name)) for name in ("ids", "target")}


def select_seq2seq(
    table: Dataset,
    source: Source,
    frame: Frame,
    *,
    max_length: int | None,
    max_target_length: int | None,
    truncation: Truncation,
    bad_rows: BadRows,
) -> Seq2SeqRows:
    """Decides which rows are used and where they are cut.

    Args:
        table: from :func:`tokenise_seq2seq`.
        source: to say where a row stands.
        frame: of its tokenizer.
        max_length: most tokens that are read, special ones included; None: any number.
        max_target_length: most tokens that are written, the end token included; None: any number.
        truncation: what happens to longer rows; ``keep_end`` cuts the beginning of what is read. What is written always loses its
            end, and its end token with it, since the model should not learn to stop there.
        bad_rows: what happens to unfit rows.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    if max_length is not None and max_length <= frame.size:
        raise Refusal(
            f"max_length {max_length} leaves no room beside the {frame.size} special tokens of a row: raise it."
        )
    both = table.data.column("length").to_numpy().astype(np.int64)
    written = table.data.column("written").to_numpy().astype(np.int64)
    sieve = Sieve(source, len(both), bad_rows)
    sieve.take_out(both == 0, "unfit", lambda row, _: str(table[row]["problem"]))
    read = sieve.within(both - written, max_length, truncation, of=" to read")
    scored = sieve.within(written, max_target_length, truncation, "max_target_length", of=" to write")
    keep_end, every = truncation == "keep_end", np.arange(len(both))
    rows = Seq2SeqRows(table, every, read + scored, scored, keep_end, None, sieve.report(), frame, read)
    kept = rows.subset(sieve.left())
    assert isinstance(kept, Seq2SeqRows)
    return kept


def collate_seq2seq(
    segments: Sequence[Segment],
    *,
    start: int,
    window: dict[str, float] | None = None,
    task: str | None = None,
) -> Batch:
    """One micro-batch: what is written, shifted right behind the start token, and what is read beside it.

    Args:
        segments: `Seq2SeqSegment` rows; none gives a filler batch.
        start: the token that the model's decoder begins with.
        window: totals of the accumulation window.
        task: name of the task that all rows belong to.
    """
    rows = list(cast("Sequence[Seq2SeqSegment]", segments))
    targets = [row.ids for row in rows] or [FILLER.ids]
    sources = [row.source for row in rows] or [FILLER.ids]
    decoder = Layout.of([len(target) for target in targets], packed=False)
    encoder = Layout.of([len(ids) for ids in sources], packed=False)
    learned = targets if rows else [np.empty(0, dtype=np.int64)]
    scored, owner = decoder.flat([np.arange(len(target)) for target in learned])
    numbers, real = real_rows(rows or [FILLER])
    encoder_mask = encoder.mask()
    assert encoder_mask is not None
    return Batch(
        ids=decoder.fill([np.concatenate([[start], target[:-1]]) for target in targets]),
        positions=decoder.positions(),
        bounds=None,
        mask=decoder.mask(),
        scored=scored,
        labels=joined(learned),
        segment_of_scored=owner,
        rows=numbers,
        counts={"token": float(len(scored)), "row": real},
        window=window,
        task=task,
        source=EncoderRows(encoder.fill(sources), encoder_mask),
    )
