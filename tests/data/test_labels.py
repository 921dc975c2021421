"""Labels: what a file asks for, told from its columns, and what is refused, by file and line."""

import json

import numpy as np
import pytest

from lightning_ft.data.labels import answers_of, asked_of, columns_of
from lightning_ft.data.sources import open_source
from lightning_ft.functional.errors import Refusal


def source_of(tmp_path, rows, name="rows.jsonl"):
    file = tmp_path / name
    if name.endswith(".csv"):
        file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(file), any_columns=True)


def labelled(*labels, column="label"):
    return [{"text": f"text {n}", column: label} for n, label in enumerate(labels)]


def read(tmp_path, rows, task=None, labels=None, **columns):
    source = source_of(tmp_path, rows)
    names = columns_of(source, task, *(columns.get(k) for k in ("text", "pair", "label")), labelled=True)
    asked = asked_of([source], [names], task, labels)
    return asked, answers_of(source, names.label, asked)


@pytest.mark.parametrize(
    "labels, names, numbers",
    [
        (("b", "a", "b"), ("a", "b"), [1, 0, 1]),
        ((2, 0, 1), ("0", "1", "2"), [2, 0, 1]),  # whole numbers from 0 keep their number
        ((10, 9, 3), ("3", "9", "10"), [2, 1, 0]),  # gaps: by size, not by spelling
        ((True, False, True), ("false", "true"), [1, 0, 1]),
        (("1", 0, 1), ("0", "1"), [1, 0, 1]),  # one file writes strings, another numbers
    ],
)
def test_classes_by_name_and_number(tmp_path, labels, names, numbers):
    asked, answers = read(tmp_path, labelled(*labels))
    assert (asked.task, asked.multi_label, asked.names) == ("sequence_classification", False, names)
    assert answers.values.tolist() == numbers and answers.begins.tolist() == [0, 1, 2, 3]


def test_listed_names_give_numbers_their_meaning(tmp_path):
    asked, answers = read(tmp_path, labelled(0, 1, "good"), labels=["bad", "good"])
    assert asked.names == ("bad", "good") and answers.values.tolist() == [0, 1, 1]
    asked, answers = read(tmp_path, labelled(1, 5, "5"), labels=["5", "1"])  # names that are numbers are names
    assert answers.values.tolist() == [1, 0, 0]
    with pytest.raises(Refusal, match=r"rows.jsonl, line 2: the label '2' is none of the 2 classes bad, good"):
        read(tmp_path, labelled(0, 2), labels=["bad", "good"])


def test_several_classes_and_none(tmp_path):
    asked, answers = read(tmp_path, labelled(["b", "a"], [], ["c"]))
    assert asked.multi_label and asked.names == ("a", "b", "c")
    assert [answers.of(row).tolist() for row in range(3)] == [[0, 1], [], [2]]
    _, answers = read(tmp_path, labelled([1, 0, 0], [2]))
    assert "lists the class '0' twice" in answers.problems[0] and answers.of(1).tolist() == [2]
    _, answers = read(tmp_path, labelled(["a"], "b"))
    assert "must be a list of the classes that hold, found a string" in answers.problems[1]


def test_numbers(tmp_path):
    asked, answers = read(tmp_path, labelled(1, 2.5, -3))
    assert asked.task == "regression" and answers.values.tolist() == [1.0, 2.5, -3.0]
    rows = labelled(1.5, float("nan"), float("inf"), None, True, "2.5", "x", [1.0], 1e300)
    _, answers = read(tmp_path, rows, task="regression")
    assert sorted(answers.problems) == [1, 2, 3, 4, 6, 7, 8] and answers.values.tolist() == [1.5, 2.5]
    assert "not a finite number" in answers.problems[1] and "not a finite number" in answers.problems[8]
    assert "true or false, no number" in answers.problems[4] and answers.problems[3] == "the row has no label."


def test_text_that_reads_as_numbers_is_not_guessed_at(tmp_path):
    source = source_of(tmp_path, [("a", "0.5"), ("b", "1.5")], "rows.csv")
    columns = columns_of(source, None, None, None, None, labelled=True)
    with pytest.raises(Refusal, match="reads as numbers, such as '0.5': set task to regression"):
        asked_of([source], [columns], None, None)
    assert asked_of([source], [columns], "regression", None).task == "regression"
    whole = source_of(tmp_path, [("a", "0"), ("b", "1")], "whole.csv")
    assert asked_of([whole], [columns], None, None).names == ("0", "1")


def test_words(tmp_path):
    rows = [{"tokens": ["EU", "calls"], "ner_tags": ["B-ORG", None]}, {"tokens": ["x"], "ner_tags": ["O"]}]
    asked, answers = read(tmp_path, rows)
    assert (asked.task, asked.names) == ("token_classification", ("B-ORG", "O"))
    assert [answers.of(row).tolist() for row in range(2)] == [[0, -1], [1]]
    asked, _ = read(tmp_path, [{"words": ["a", "b"], "pos": [0, 1]}], text="words", label="pos")
    assert asked.task == "token_classification"


@pytest.mark.parametrize(
    "rows, options, match",
    [
        (labelled("a", "a"), {}, "has the one class 'a', so there is nothing to tell apart"),
        (labelled(None, None), {}, "has no class"),
        (labelled("a", "b", column="lable"), {}, r"has no column 'label'; it has lable, text.*perhaps 'lable'"),
        (labelled("a", "b"), {"text": "sentence"}, "has no column 'sentence'.*text_column"),
        (labelled("a", "b"), {"pair": "hypothesis"}, "has no column 'hypothesis'.*pair_column"),
        (
            labelled("positive", "negative", "postive"),
            {"labels": ["negative", "positive"]},
            "line 3.*is 'positive' meant",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path, rows, options, match):
    with pytest.raises(Refusal, match=match):
        read(tmp_path, rows, **options)


def test_unfit_labels_are_told_apart_from_unknown_ones(tmp_path):
    rows = labelled("a", None, "b", "", -1, 0.5, {"x": 1})
    _, answers = read(tmp_path, rows, task="sequence_classification")
    assert sorted(answers.problems) == [1, 3, 4, 5, 6]
    assert "classes are names, or whole numbers from 0" in answers.problems[4]
    assert "found an object" in answers.problems[6]


def test_names_that_a_hub_data_set_declares(tmp_path):
    import datasets

    from lightning_ft.data.sources import Source

    feature = datasets.ClassLabel(names=["world", "sports", "science"])
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}).cast_column("label", feature)
    source = Source("hub", table, "key", "row")
    columns = columns_of(source, None, None, None, None, labelled=True)
    asked = asked_of([source], [columns], None, None)
    assert asked.names == ("world", "sports", "science")
    assert answers_of(source, "label", asked).values.tolist() == [2, 0]


def test_answers_of_a_row_agree_with_numpy(tmp_path):
    generator = np.random.default_rng(0)
    lists = [sorted({int(k) for k in generator.integers(0, 6, generator.integers(0, 5))}) for _ in range(60)]
    asked, answers = read(tmp_path, labelled(*lists), labels=[f"c{k}" for k in range(6)])
    assert asked.multi_label
    assert [answers.of(row).tolist() for row in range(60)] == lists
