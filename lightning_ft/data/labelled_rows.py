"""Labelled texts as tokens: tokenised once into the cache, framed, cut and joined with their labels when dealt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.collate_labelled import LabelledSegment
from lightning_ft.data.frames import Frame, shares
from lightning_ft.data.labels import Answers, Asked, Columns
from lightning_ft.data.prefixes import plain_ids
from lightning_ft.data.rows import text_in, type_in_words, whole_text
from lightning_ft.data.sources import Source
from lightning_ft.data.token_rows import BadRows, Lists, Sieve, TokenRows, Truncation
from lightning_ft.data.tokenise import cached_rows
from lightning_ft.functional.errors import Refusal

_TEXT_COLUMNS = {"second": datasets.Value("int32")}  # where the second text begins among the ids
_WORD_COLUMNS = {
    "starts": datasets.Sequence(datasets.Value("int32")),  # first token of each word that has tokens
    "words": datasets.Sequence(datasets.Value("int32")),  # the numbers of these words
    "given": datasets.Value("int32"),  # how many words the row has
}


def tokenise_labelled(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    *,
    keep_bad_rows: bool,
    cache_dir: str | Path | None,
) -> Dataset:
    """Tokenises the texts of a file, or finds them tokenised; labels are not part of it.

    Args:
        source: the rows.
        tokenizer: any.
        columns: where the texts are, and whether they are lists of words.
        keep_bad_rows: put the reason into the column ``problem`` instead of raising at the first unfit row.
        cache_dir: folder of the cache.

    Returns:
        One row for each of the source: ``ids`` without special tokens, ``length`` with them, and ``second``, or
        ``starts``, ``words`` and ``given``.

    Raises:
        Refusal: an unfit row, or no room on the disk.
    """
    frame = Frame.of(tokenizer, pair=columns.pair is not None)
    render = (
        words_renderer(tokenizer, columns.text, frame) if columns.words else _text_renderer(tokenizer, columns, frame)
    )
    about = {"kind": "words" if columns.words else "texts", "text": columns.text, "pair": columns.pair}
    own = _WORD_COLUMNS if columns.words else _TEXT_COLUMNS
    return cached_rows(source, tokenizer, render, own, about, keep_bad_rows=keep_bad_rows, cache_dir=cache_dir)


_Made = list[Mapping[str, Any] | Refusal]


def _text_renderer(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, frame: Frame
) -> Callable[[list[dict[str, Any]]], _Made]:
    names = [columns.text, *([columns.pair] if columns.pair is not None else [])]

    def texts_of(row: Mapping[str, Any]) -> list[str]:
        return [text_in(row, name) for name in names]

    def one(row: Mapping[str, Any], ids: Mapping[str, list[int]]) -> Mapping[str, Any]:
        parts = [ids[row[name]] for name in names]
        for name, part in zip(names, parts, strict=True):
            if not part:
                raise Refusal(f"{name} has no tokens: the tokenizer makes nothing of {row[name][:30]!r}.")
        joined = [token for part in parts for token in part]
        return {"ids": joined, "length": len(joined) + frame.size, "second": len(parts[0])}

    def render(rows: list[dict[str, Any]]) -> _Made:
        checked = [_tried(texts_of, row) for row in rows]
        ids = plain_ids(tokenizer, (text for texts in checked if not isinstance(texts, Refusal) for text in texts))
        made = [
            texts if isinstance(texts, Refusal) else _tried(one, row, ids)
            for row, texts in zip(rows, checked, strict=True)
        ]
        _prove(tokenizer, frame, names, rows, made)
        return made

    return render


def _prove(
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    made: _Made,
) -> None:
    """Compares the first row of some with what the tokenizer makes of it by itself."""
    found = next(((row, item) for row, item in zip(rows, made, strict=True) if not isinstance(item, Refusal)), None)
    if found is None:
        return
    row, item = found
    ids = np.array(item["ids"])
    mine = frame.ids(ids[: item["second"]], ids[item["second"] :]).tolist()
    whole = list(tokenizer(*[row[name] for name in names])["input_ids"])
    if mine != whole:
        raise Refusal(
            f"The tokenizer {type(tokenizer).__name__} makes other tokens of a row than of its texts and special tokens "
            f"apart ({len(whole)} and {len(mine)}), so rows cannot be cut without harm; use another tokenizer."
        )


def words_renderer(
    tokenizer: PreTrainedTokenizerBase, column: str, frame: Frame
) -> Callable[[list[dict[str, Any]]], _Made]:
    """What tokenises rows of words: ``ids`` without special tokens, the first token of each word that has any, and which it is.

    Args:
        tokenizer: any.
        column: of the words.
        frame: the tokenizer's special tokens.
    """
    glue = _glue(tokenizer)

    def words_of(row: Mapping[str, Any]) -> list[str]:
        words = row.get(column)
        if not isinstance(words, list):
            raise Refusal(f"{column} must be a list of words, found {type_in_words(words)}.")
        for number, word in enumerate(words):
            if not isinstance(word, str):
                raise Refusal(f"{column}[{number}] must be a string, found {type_in_words(word)}.")
            whole_text(word, f"{column}[{number}]")
        if not words:
            raise Refusal(f"{column} is empty, so there is nothing to learn from this row.")
        return words

    def one(ids: Sequence[int], of_word: Sequence[int | None], given: int) -> Mapping[str, Any]:
        starts = [n for n, word in enumerate(of_word) if word is not None and (n == 0 or of_word[n - 1] != word)]
        if not starts:
            raise Refusal(f"{column} has no tokens: the tokenizer makes nothing of its words.")
        return {
            "ids": ids,
            "length": len(ids) + frame.size,
            "starts": starts,
            "words": [of_word[n] for n in starts],
            "given": given,
        }

    def render(rows: list[dict[str, Any]]) -> _Made:
        checked = [_tried(words_of, row) for row in rows]
        good = [words for words in checked if not isinstance(words, Refusal)]
        encoded = iter(_encode_words(tokenizer, good, glue))
        return [words if isinstance(words, Refusal) else _tried(one, *next(encoded), len(words)) for words in checked]

    return render


def _encode_words(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]], glue: str
) -> list[tuple[list[int], list[int | None]]]:
    """For each row its ids without special tokens, and the word that each of them belongs to."""
    if not rows:
        return []
    glued = [[words[0], *(glue + word for word in words[1:])] for words in rows]
    if not tokenizer.is_fast:
        found = []
        for words in glued:
            ids = plain_ids(tokenizer, words)
            parts = [ids[word] for word in words]
            of_word: list[int | None] = [number for number, part in enumerate(parts) for _ in part]
            found.append(([token for part in parts for token in part], of_word))
        return found
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(glued, is_split_into_words=True, add_special_tokens=False, **options)
    return [(encoded["input_ids"][n], encoded.word_ids(n)) for n in range(len(glued))]


def _glue(tokenizer: PreTrainedTokenizerBase) -> str:
    """What has to stand before a word that is not the first, so that it reads as it does in a text: a space, or nothing.

    Byte-level tokenizers keep the space before a word in the word's token, and a list of words has none.
    """
    text = plain_ids(tokenizer, ["a a"])["a a"]
    spaced, bare = (_encode_words(tokenizer, [["a", "a"]], glue)[0][0] for glue in (" ", ""))
    return " " if spaced == text and bare != text else ""


def _tried(make: Callable[..., Any], *given: Any) -> Any:
    """What comes of it, or the refusal itself, since one row must not hide another."""
    try:
        return make(*given)
    except Refusal as refusal:
        return refusal


@dataclass(frozen=True)
class LabelledRows(TokenRows):
    """Rows ready to be dealt, with what they ask for.

    Attributes:
        frame: the special tokens around them.
        asked: what is learned.
        answers: the labels of all rows of the source.
    """

    frame: Frame
    asked: Asked
    answers: Answers

    def segments(self, numbers: Sequence[int] | np.ndarray) -> list[LabelledSegment]:  # type: ignore[override]
        """The rows at these places (from 0 to ``len(self) - 1``), cut as agreed."""
        return [self._segment(int(self.index[n]), int(self.lengths[n])) for n in np.asarray(numbers).tolist()]

    def _segment(self, row: int, length: int) -> LabelledSegment:
        if self.asked.task == "token_classification":
            first, second = self._columns["ids"][row], np.empty(0, dtype=np.int64)
        else:
            ids, border = self._columns["ids"][row], int(self._second[row])
            first, second = ids[:border], ids[border:]
        one, two = shares(len(first), len(second), length - self.frame.size)
        cut = len(first) - one
        first = first[cut:] if self.keep_end else first[:one]
        second = second[len(second) - two :] if self.keep_end else second[:two]
        at, classes = self._marks(row, one, cut)
        return LabelledSegment(
            ids=self.frame.ids(first, second),
            spans=np.empty((0, 2), dtype=np.int64),
            row=row,
            types=self.frame.types_of(one, two),
            at=at + len(self.frame.before),
            classes=classes,
            target=target_of(self.asked, self.answers.of(row)),
        )

    def _marks(self, row: int, kept: int, cut: int) -> tuple[np.ndarray, np.ndarray]:
        """Places among the kept tokens of the words' first ones that have a class, and these classes."""
        if self.asked.task != "token_classification":
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        starts = self._columns["starts"][row].astype(np.int64) - (cut if self.keep_end else 0)
        values = self.answers.of(row)
        # Rows to predict may have no tags: each word is asked for, and 0 stands where the answer would.
        classes = values[self._columns["words"][row]] if len(values) else np.zeros(len(starts), dtype=np.int64)
        here = (starts >= 0) & (starts < kept) & (classes >= 0)
        return starts[here], classes[here]

    def classes(self) -> np.ndarray:
        """(rows,) the class of each row, where each has exactly one."""
        return self.answers.values[self.answers.begins[self.index]]

    def class_counts(self) -> np.ndarray:
        """(C,) rows of each class; of token classification, tokens that are scored."""
        if self.asked.task == "token_classification":
            found = [
                self._marks(int(row), int(length) - self.frame.size, self._cut_of(int(row), int(length)))[1]
                for row, length in zip(self.index, self.lengths, strict=True)
            ]
        else:
            found = [self.answers.of(int(row)) for row in self.index]
        return np.bincount(np.concatenate([np.empty(0, dtype=np.int64), *found]), minlength=len(self.asked.names))

    def _cut_of(self, row: int, length: int) -> int:
        return int(self._all_lengths[row]) - length

    def subset(self, numbers: np.ndarray) -> LabelledRows:
        """These rows alone; the report counts them and their classes."""
        rows = super().subset(numbers)
        assert isinstance(rows, LabelledRows)
        return replace(rows, report=replace(rows.report, facts=rows._facts()))

    def _facts(self) -> dict[str, str]:
        if self.asked.task != "regression":
            counts = self.class_counts()
            shown = [f"{name} {count:,}" for name, count in zip(self.asked.names[:20], counts, strict=False)]
            return {"classes": ", ".join(shown) + (", ..." if len(counts) > 20 else "")}
        values = np.array([value for row in self.index for value in self.answers.of(int(row))])
        if not len(values):
            return {}
        return {
            "values": f"{values.min():g} to {values.max():g}, mean {values.mean():.3g}, deviation {values.std():.3g}"
        }

    @cached_property
    def _columns(self) -> dict[str, Lists]:
        names = ("ids", "starts", "words") if self.asked.task == "token_classification" else ("ids",)
        return {name: Lists(self.table.data.column(name)) for name in names}

    @cached_property
    def _second(self) -> np.ndarray:
        return self.table.data.column("second").to_numpy()

    @cached_property
    def _all_lengths(self) -> np.ndarray:
        return self.table.data.column("length").to_numpy()


def target_of(asked: Asked, values: np.ndarray) -> np.ndarray | None:
    """What a row asks for as a whole: () int64 or float32, or (C,) float32; zeros where it has no label."""
    if asked.task == "token_classification":
        return None
    if asked.multi_label:
        target = np.zeros(len(asked.names), dtype=np.float32)
        target[values] = 1
        return target
    dtype = np.float32 if asked.task == "regression" else np.int64
    return np.asarray(values[0] if len(values) else 0, dtype=dtype)


def select_labelled(
    table: Dataset,
    source: Source,
    frame: Frame,
    asked: Asked,
    answers: Answers,
    *,
    max_length: int | None,
    truncation: Truncation,
    bad_rows: BadRows,
    labelled: bool = True,
) -> LabelledRows:
    """Decides which labelled rows are used and where they are cut.

    Args:
        table: from :func:`tokenise_labelled`.
        source: to say where a row stands.
        frame: of its tokenizer.
        asked: what is learned.
        answers: of the source.
        max_length: most tokens a row may have, special ones included; None: any number.
        truncation: what happens to longer rows; those that are cut keep their special tokens.
        bad_rows: what happens to rows with unfit texts or labels, and to those that lose all their labels.
        labelled: whether rows must have labels; those to predict need none.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    if max_length is not None and max_length <= frame.size + int(frame.pair):
        raise Refusal(
            f"max_length {max_length} leaves no room beside the {frame.size} special tokens of a row: raise it."
        )
    whole = table.data.column("length").to_numpy().astype(np.int64)
    sieve = Sieve(source, len(whole), bad_rows)
    sieve.take_out(whole == 0, "unfit", lambda row, _: str(table[row]["problem"]))
    sieve.take_out(_places(answers.problems, len(whole)), "no label to learn", lambda row, _: answers.problems[row])
    words = asked.task == "token_classification"
    if words:
        given, tags = table.data.column("given").to_numpy(), np.diff(answers.begins)
        sieve.take_out(
            (tags != given) & (labelled | (tags > 0)),
            "not one tag a word",
            lambda row, _: f"the row has {given[row]} words and {tags[row]} tags: each word needs one (null for none).",
        )
    lengths = sieve.within(whole, max_length, truncation)
    keep_end, zeros = truncation == "keep_end", np.zeros(len(whole), dtype=np.int64)
    rows = LabelledRows(
        table, np.arange(len(whole)), lengths, zeros, keep_end, None, sieve.report(), frame, asked, answers
    )
    if words:
        scored = zeros.copy()
        for row in sieve.left().tolist():
            scored[row] = len(rows._marks(row, int(lengths[row]) - frame.size, int(whole[row] - lengths[row]))[0])
        rows = replace(rows, scored=scored)
        sieve.take_out(
            scored == 0,
            "no word with a label",
            lambda row, n: (
                f"the row has no word with a label (after truncation), as have {n} rows: there is nothing to learn."
            ),
        )
    return rows.subset(sieve.left())


def _places(rows: Mapping[int, str], count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[list(rows)] = True
    return mask
