"""Preferences that cannot be learned from, in one table: each is refused by file and line, or left out and counted.

A case is the second row of a file, whose first one is good, and what must be said after ``FILE, line 2`` (a regular
expression), or None where the row is as good as the first.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_ft.functional.errors import Refusal
from tests.data.preferences import LAYOUTS, assistant, pairs_of, scored, singles_of, user, written
from tests.data.tiny_tokenizers import CHATML, UNCLOSED, tiny_tokenizer

TEXT = {"prompt": "hello", "chosen": " yes", "rejected": " no"}
CHAT = {"prompt": [user("hello")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
WHOLE = {"chosen": [user("hello"), assistant("yes")], "rejected": [user("hello"), assistant("no")]}
WITH = {**TEXT, "margin": 0.5}
LABELLED = {"prompt": "hello", "completion": " yes", "label": True}

# id, first row, the row, what must be said of it
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any], str | None]] = [
    # columns and types
    ("no rejected", TEXT, {"prompt": "a", "chosen": " b"}, "rejected must be a string, found nothing"),
    ("chosen null", TEXT, {**TEXT, "chosen": None}, "chosen must be a string, found nothing"),
    ("rejected a number", TEXT, {**TEXT, "rejected": 1}, "rejected must be a string, found a number"),
    ("chosen NaN", TEXT, {**TEXT, "chosen": math.nan}, "chosen must be a string, found NaN, a missing value"),
    ("prompt a number", TEXT, {**TEXT, "prompt": 1}, "prompt must be a string or a list of messages, found a number"),
    ("one list, one string", CHAT, {**CHAT, "rejected": "no"}, "must all be .* found a list, a list and a string"),
    ("a list of strings", CHAT, {**CHAT, "chosen": ["yes"]}, r"chosen\[0\] must be an object with role and content"),
    ("an unknown role", CHAT, {**CHAT, "chosen": [{"role": "gpt", "content": "a"}]}, "did you mean 'assistant'"),
    ("tools as text", CHAT, {**CHAT, "tools": "{"}, "tools is a string that is not JSON"),
    ("texts among chats", CHAT, TEXT, None),
    # empty answers
    ("chosen empty", TEXT, {**TEXT, "chosen": ""}, "chosen is empty, so there is nothing to learn"),
    ("rejected white", TEXT, {**TEXT, "rejected": " \n"}, "rejected is only white space"),
    ("rejected without messages", CHAT, {**CHAT, "rejected": []}, "rejected is empty"),
    ("an answer without content", CHAT, {**CHAT, "rejected": [assistant(" ")]}, "is an assistant turn without content"),
    ("half of a character", TEXT, {**TEXT, "chosen": " \ud83d"}, "chosen holds half of a character"),
    # alike
    ("the same", TEXT, {**TEXT, "rejected": " yes"}, "chosen and rejected are the same tokens, as in 1 row:"),
    ("the same chats", CHAT, {**CHAT, "rejected": CHAT["chosen"]}, "chosen and rejected are the same tokens"),
    (
        "the same conversations",
        WHOLE,
        {**WHOLE, "rejected": WHOLE["chosen"]},
        "chosen and rejected are the same tokens",
    ),
    (
        "the same texts",
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "a b", "rejected": "a b"},
        "are the same tokens",
    ),
    # prompts
    ("an empty prompt", TEXT, {**TEXT, "prompt": ""}, "the prompt has no token"),
    (
        "a prompt that is joined to its answer",
        TEXT,
        {**TEXT, "prompt": "hello ", "chosen": "world"},
        "chosen: its prompt is not a prefix of",
    ),
    (
        "nothing in common",
        WHOLE,
        {**WHOLE, "rejected": [user("no"), assistant("b")]},
        "no message in common that they begin with",
    ),
    ("answers alone", WHOLE, {"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}, "no message in common"),
    (
        "different questions",
        WHOLE,
        {"chosen": [user("a"), user("b"), assistant("c")], "rejected": [user("a"), user("c"), assistant("d")]},
        "chosen goes on after the prompt with a turn of user",
    ),
    (
        "one conversation ends where the other goes on",
        WHOLE,
        {**WHOLE, "rejected": [*WHOLE["chosen"], user("b"), assistant("c")]},
        "chosen has no answer after the 2 messages",
    ),
    (
        "different texts",
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "yes", "rejected": "no"},
        "begin with different tokens",
    ),
    (
        "a text that ends where the other goes on",
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "hello yes", "rejected": "hello yes no"},
        "chosen has nothing after what chosen and rejected both begin with",
    ),
    (
        "an answer of the user",
        CHAT,
        {**CHAT, "chosen": [user("yes")]},
        "chosen goes on after the prompt with a turn of user",
    ),
    ("a prompt that repeats itself", CHAT, {**CHAT, **WHOLE}, None),
    ("a prompt as text beside conversations", CHAT, {**WHOLE, "prompt": "hello"}, None),
    ("a prompt as text beside answers", CHAT, {**CHAT, "prompt": "hello"}, None),
    ("another prompt beside conversations", CHAT, {**WHOLE, "prompt": "no"}, "do not ask what prompt says"),
    # margins
    ("margin text", WITH, {**WITH, "margin": "much"}, "margin must be a number, found the text 'much'"),
    ("margin NaN", WITH, {**WITH, "margin": math.nan}, "margin must be a finite number, found nan"),
    ("margin NaN as text", WITH, {**WITH, "margin": "nan"}, "margin must be a finite number, found 'nan'"),
    ("margin infinite", WITH, {**WITH, "margin": math.inf}, "margin must be a finite number"),
    ("margin too large", WITH, {**WITH, "margin": 1e39}, "margin must be a finite number"),
    ("margin true", WITH, {**WITH, "margin": True}, "margin must be a number, found true or false"),
    ("margin a list", WITH, {**WITH, "margin": [1]}, "margin must be a number, found a list"),
    ("no margin", WITH, TEXT, "the row has no margin, as others of the file have"),
    ("margin as text", WITH, {**WITH, "margin": "0.25"}, None),
    ("margin below zero", WITH, {**WITH, "margin": -1}, None),
]

SINGLES: list[tuple[str, dict[str, Any], dict[str, Any], str | None]] = [
    *(
        (f"label {label!r}", LABELLED, {**LABELLED, "label": label}, None)
        for label in (False, 1, 0, 1.0, "true", "False", "0")
    ),
    ("label maybe", LABELLED, {**LABELLED, "label": "maybe"}, "label must be true or false .* found 'maybe'"),
    ("label null", LABELLED, {**LABELLED, "label": None}, "label must be true or false .* found nothing"),
    ("label two", LABELLED, {**LABELLED, "label": 2}, "found 2"),
    ("label NaN", LABELLED, {**LABELLED, "label": math.nan}, "label must be true or false .* found nan"),
    ("label empty", LABELLED, {**LABELLED, "label": ""}, "label must be true or false"),
    ("label a list", LABELLED, {**LABELLED, "label": [True]}, "found a list"),
    ("completion empty", LABELLED, {**LABELLED, "completion": ""}, "completion is empty"),
    ("completion null", LABELLED, {**LABELLED, "completion": None}, "completion must be a string, found nothing"),
    ("prompt null", LABELLED, {**LABELLED, "prompt": None}, "the row has no prompt"),
    ("prompt empty", LABELLED, {**LABELLED, "prompt": ""}, "the prompt has no token"),
    (
        "prompt a list",
        LABELLED,
        {**LABELLED, "prompt": [user("a")]},
        "both be strings or both be lists .* a list and a string",
    ),
    ("a chat", LABELLED, {"prompt": [user("a")], "completion": [assistant("b")], "label": 1}, None),
    ("a conversation", LABELLED, {"prompt": [user("a")], "completion": [user("a"), assistant("b")], "label": 1}, None),
    ("a prompt as text", LABELLED, {"prompt": "a", "completion": [assistant("b")], "label": 1}, None),
    (
        "no answer",
        LABELLED,
        {"prompt": [user("a")], "completion": [user("a")], "label": 1},
        "no message after the prompt",
    ),
    (
        "the user's turn",
        LABELLED,
        {"prompt": [user("a")], "completion": [user("b")], "label": 1},
        "with a turn of user",
    ),
    (
        "joined",
        LABELLED,
        {"prompt": "hello ", "completion": "world", "label": 1},
        "completion: its prompt is not a prefix",
    ),
]


@pytest.mark.parametrize("first, row, match", [case[1:] for case in PAIRS], ids=[case[0] for case in PAIRS])
def test_pairs(first: dict[str, Any], row: dict[str, Any], match: str | None, tmp_path: Path) -> None:
    path = written(tmp_path, [first, row])
    kept = pairs_of(path, tmp_path, bad_rows="drop", **LAYOUTS["shared"])
    assert {number for number, _ in scored(kept)} == ({0} if match else {0, 1})
    report = kept.reports()["train"]
    assert (report.rows, report.kept, sum(report.dropped.values())) == ((2, 1, 1) if match else (2, 2, 0))
    strict = pairs_of(path, tmp_path)
    strict.check_files()
    if match is None:
        strict.setup("fit")
        return
    with pytest.raises(Refusal, match=match) as caught:
        strict.setup("fit")
    said = str(caught.value)
    assert said.startswith(f"{path}, line 2: ") and "\n" not in said


@pytest.mark.parametrize("first, row, match", [case[1:] for case in SINGLES], ids=[case[0] for case in SINGLES])
def test_single_answers(first: dict[str, Any], row: dict[str, Any], match: str | None, tmp_path: Path) -> None:
    path = written(tmp_path, [first, row, {**first, "prompt": "world"}])
    kept = singles_of(path, tmp_path, bad_rows="drop", **LAYOUTS["shared"])
    assert {number for number, _ in scored(kept)} == ({0, 2} if match else {0, 1, 2})
    strict = singles_of(path, tmp_path)
    if match is None:
        good = str(row["label"]).lower() in ("true", "1", "1.0")
        strict.setup("fit")
        assert strict.label_counts() == {"desirable": 2 + good, "undesirable": 1 - good}
        return
    with pytest.raises(Refusal, match=match) as caught:
        strict.setup("fit")
    assert str(caught.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("bad", [case[2] for case in PAIRS if case[1] is CHAT and case[3]])
def test_the_first_row_is_looked_at_before_a_model_is_loaded(bad: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, [bad, CHAT])
    if bad["chosen"] == bad["rejected"]:
        return  # only tokens tell
    with pytest.raises(Refusal, match="pairs.jsonl, line 1: "):
        pairs_of(path, tmp_path).check_files("fit")
    pairs_of(path, tmp_path, bad_rows="drop").check_files("fit")


@pytest.mark.parametrize(
    "row, match",
    [
        (
            {"prompt": "a", "completion": "b"},
            "line 1: found the columns completion, prompt, expected chosen . rejected",
        ),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "is 'reject' meant to be 'rejected'"),
        ({"text": "a"}, "found the columns text, expected"),
    ],
)
def test_columns_of_pairs(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    for options in ({}, {"bad_rows": "drop"}):
        with pytest.raises(Refusal, match=match):
            pairs_of(written(tmp_path, [row]), tmp_path, **options).check_files()


@pytest.mark.parametrize(
    "row, match",
    [
        ({"prompt": "a", "completion": "b"}, r"expected prompt . completion . label, or prompt . chosen . rejected"),
        ({"prompt": "a", "completion": "b", "labels": True}, "is 'labels' meant to be 'label'"),
        ({"text": "a", "label": 1}, "found the columns label, text"),
    ],
)
def test_columns_of_single_answers(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=match):
        singles_of(written(tmp_path, [row]), tmp_path).check_files()


@pytest.mark.parametrize(
    "template, puts_bos, row, match",
    [
        (UNCLOSED, False, CHAT, r"chosen: messages\[1\] .assistant. has no end of turn"),
        (None, False, CHAT, "has no chat template"),
        (CHATML, True, {**TEXT, "prompt": "<s>hello"}, "begins with two BOS tokens"),
        ("{{ messages[-1].content }}<|im_end|>", False, WHOLE, r"leaves messages\[0\] .user. out"),
    ],
)
def test_templates_and_tokenizers_that_do_not_fit(
    template: str | None, puts_bos: bool, row: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=match):
        pairs_of(written(tmp_path, [row]), tmp_path, tiny_tokenizer(template, puts_bos=puts_bos)).setup("fit")


def test_nothing_left(tmp_path: Path) -> None:
    path = written(tmp_path, [{**TEXT, "rejected": " yes"}] * 3)
    with pytest.raises(Refusal, match="no row is left to use .3 chosen and rejected are the same"):
        pairs_of(path, tmp_path, bad_rows="drop").setup("fit")


def test_rows_nested_too_deeply(tmp_path: Path) -> None:
    deep: Any = "a"
    for _ in range(400):
        deep = [deep]
    file = tmp_path / "deep.jsonl"
    file.write_text(json.dumps(TEXT) + "\n" + json.dumps({**CHAT, "tools": deep}) + "\n")
    with pytest.raises(Refusal):
        pairs_of(str(file), tmp_path).setup("fit")
