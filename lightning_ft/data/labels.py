"""What a labelled file asks for: classes of rows, several of them at once, a number, or a class of each word.

Classes have names. Integers that count from 0 keep their number; names that nobody listed are those of the training
files, sorted, so that a label means the same in every file, run and process.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import datasets
import numpy as np

from lightning_ft.data.rows import type_in_words
from lightning_ft.data.sources import Source
from lightning_ft.functional.errors import Refusal

LabelTask = Literal["sequence_classification", "token_classification", "regression"]

TAG_COLUMNS = ("tags", "ner_tags", "labels")
"""Where the tags of words are looked for."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        text: the text, or the list of words.
        pair: the second text, or None.
        label: the label, or the list of tags.
        words: whether the text is a list of words.
    """

    text: str
    pair: str | None
    label: str
    words: bool


def columns_of(
    source: Source, task: LabelTask | None, text: str | None, pair: str | None, label: str | None, *, labelled: bool
) -> Columns:
    """Finds the columns of a file.

    Args:
        source: the file.
        task: what is learned; None tells it from the columns alone: lists of words and tags are token_classification.
        text: name of the text's column; None: ``text``, or ``tokens`` of words.
        pair: of the second text's, if there is one.
        label: of the label's; None: ``label``, or ``tags``, ``ner_tags`` or ``labels`` of words.
        labelled: whether there must be labels.

    Raises:
        Refusal: a column is missing.
    """
    found = set(source.columns)
    words = task == "token_classification"
    if text is None:
        text = "tokens" if words or (task is None and "tokens" in found) else "text"
    words = words or (task is None and isinstance(source.first.get(text), list))
    if label is None:
        label = next((name for name in TAG_COLUMNS if name in found), "tags") if words else "label"
    needed = [text, *([pair] if pair is not None else []), *([label] if labelled else [])]
    if missing := [name for name in needed if name not in found]:
        near = difflib.get_close_matches(missing[0], found, n=1, cutoff=0.6)
        argument = {text: "text_column", pair: "pair_column", label: "label_column"}[missing[0]]
        hint = f" (perhaps {near[0]!r})" if near else ""
        raise Refusal(
            f"{source.name} has no column {missing[0]!r}; it has {', '.join(sorted(found))}: name the right one with "
            f"{argument}{hint}."
        )
    return Columns(text, pair, label, words)


@dataclass(frozen=True)
class Asked:
    """What is learned of all files together.

    Attributes:
        task: the task.
        multi_label: whether a row may have several classes.
        names: of the classes in order; empty for regression.
        by_number: whether integers are places in ``names``.
    """

    task: LabelTask
    multi_label: bool = False
    names: tuple[str, ...] = ()
    by_number: bool = False

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number(self, value: Any) -> int:
        """The number of a class.

        Raises:
            Refusal: no class of that name; the sentence says neither file nor line.
            ValueError: no name of a class; the message is a sentence of the same kind.
        """
        name = class_name(value)
        found = self._numbers.get(name)
        if found is None and self.by_number and name.isdecimal() and int(name) < len(self.names):
            found = int(name)
        if found is None:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.6)
            shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
            raise Refusal(
                f"the label {name!r} is none of the {len(self.names)} classes {shown}"
                + (f": is {near[0]!r} meant?" if near else "; list all classes with `labels`, or correct it.")
            )
        return found


@dataclass(frozen=True)
class Answers:
    """The labels of a file as numbers.

    Attributes:
        values: int64 class numbers, or float64 values of a regression, all rows one after the other; -1 is a word
            without a label.
        begins: (rows + 1,) where each row's begin.
        problems: row number -> why its label cannot be used; it has no values then.
    """

    values: np.ndarray
    begins: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)

    def of(self, row: int) -> np.ndarray:
        """The values of a row."""
        return self.values[self.begins[row] : self.begins[row + 1]]


def class_name(value: Any) -> str:
    """The name of a class, whatever type it was written in.

    Raises:
        ValueError: it is none; the message is a sentence that says neither file nor line.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value >= 0:
        return str(value)
    if isinstance(value, float) and value.is_integer() and value >= 0:  # a table with missing values has no integers
        return str(int(value))
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("the row has no label.")
    if isinstance(value, (int, float)):
        raise ValueError(f"the label {value!r} is no class: classes are names, or whole numbers from 0.")
    raise ValueError(f"the label must name a class, found {type_in_words(value)}.")


def asked_of(
    sources: Sequence[Source], columns: Sequence[Columns], task: LabelTask | None, labels: Sequence[str] | None
) -> Asked:
    """What is learned, told from the labels of the training files.

    Args:
        sources: the files.
        columns: of each.
        task: None tells it from the labels.
        labels: names of the classes in order; None takes those that occur.

    Raises:
        Refusal: labels of which the task cannot be told, or of a single class.
    """
    values = [value for source, names in zip(sources, columns, strict=True) for value in source.column(names.label)]
    values = [value for value in values if value is not None]
    names = ", ".join(source.name for source in sources)
    if task is None:
        task = "token_classification" if columns[0].words else _told(values, names, columns[0].label)
    if task == "regression":
        return Asked(task)
    several = any(isinstance(value, list) for value in values)
    flat: Iterable[Any] = values
    if several or task == "token_classification":
        flat = (one for value in values if isinstance(value, list) for one in value if one is not None)
    found = {name for one in flat if (name := _name_or_none(one)) is not None}
    listed = list(labels) if labels is not None else _declared(sources[0], columns[0].label)
    ordered = listed if listed is not None else _in_order(found)
    if len(ordered) < 2 and not (several and ordered):
        what = f"the one class {ordered[0]!r}" if ordered else "no class"
        raise Refusal(
            f"{names}: the column {columns[0].label!r} has {what}, so there is nothing to tell apart; is it the right column "
            "(label_column)?"
        )
    by_number = listed is not None and not any(name.isdecimal() for name in ordered)
    return Asked(task, several and task == "sequence_classification", tuple(ordered), by_number)


def answers_of(source: Source, label: str, asked: Asked, *, labelled: bool = True) -> Answers:
    """The labels of a file as numbers.

    Args:
        source: the file.
        label: the column.
        asked: what is learned.
        labelled: False for rows to predict: one that has no label gets none, which is no problem.

    Raises:
        Refusal: a class that is not among those asked for, with file and line.
    """
    values: list[float] = []
    begins, problems = [0], {}
    for row, value in enumerate(source.column(label)):
        if value is not None or labelled:
            try:
                values += _numbers(value, asked)
            except Refusal as refusal:  # a class that nobody knows is no flaw of the row alone
                raise Refusal(f"{source.where(row)}: {refusal}") from None
            except ValueError as problem:
                problems[row] = str(problem)
        begins.append(len(values))
    dtype = np.float64 if asked.task == "regression" else np.int64
    return Answers(np.array(values, dtype=dtype), np.array(begins, dtype=np.int64), problems)


def _numbers(value: Any, asked: Asked) -> list[float] | list[int]:
    if asked.task == "regression":
        return [real_number(value)]
    if asked.task == "sequence_classification" and not asked.multi_label:
        return [asked.number(value)]
    if not isinstance(value, list):
        what = "the names of its words' classes" if asked.task == "token_classification" else "the classes that hold"
        raise ValueError(f"the label must be a list of {what}, found {type_in_words(value)}.")
    if asked.task == "token_classification":
        return [-1 if one is None else asked.number(one) for one in value]
    numbers = [asked.number(one) for one in value]
    if len(set(numbers)) < len(numbers):
        twice = next(one for one in numbers if numbers.count(one) > 1)
        raise ValueError(
            f"the label lists the class {asked.names[twice]!r} twice: a list names the classes that hold, it is no row of "
            "zeros and ones."
        )
    return sorted(numbers)


def real_number(value: Any) -> float:
    """The number that a label is.

    Raises:
        ValueError: it is none; the message is a sentence that says neither file nor line.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"the label {value!r} is no number." if value else "the row has no label.") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "the row has no label." if value is None else f"the label is {type_in_words(value)}, no number."
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(value)):
            raise ValueError(f"the label {value!r} is not a finite number.")
    return float(value)


def _told(values: Sequence[Any], names: str, label: str) -> LabelTask:
    """The task that labels of whole rows mean."""
    if any(isinstance(value, float) for value in values) and not any(isinstance(v, (str, list)) for v in values):
        return "regression"
    if values and all(isinstance(value, str) and _is_fraction(value) for value in values):
        raise Refusal(
            f"{names}: the column {label!r} holds text that reads as numbers, such as {values[0]!r}: set task to regression, "
            "or to sequence_classification if they name classes."
        )
    return "sequence_classification"


def _is_fraction(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text.strip().isdecimal()


def _name_or_none(value: Any) -> str | None:
    try:
        return class_name(value)
    except ValueError:
        return None  # said with its row, when the rows are read


def _declared(source: Source, label: str) -> list[str] | None:
    """Names that a data set of the hub brings with its column."""
    feature = source.table.features.get(label)
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _in_order(names: set[str]) -> list[str]:
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)
