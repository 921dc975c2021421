"""Rewards by rule, each case written out."""

import re

import pytest

from lightning_ft.functional.text_rewards import between_tags, overlong, pattern_found, tags_in_order


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>2 + 2</think> <answer>4</answer>", 1),
        ("  <think>2\n+ 2</think>\n\n<answer>4</answer>\n", 1),
        ("<think>a < b</think><answer>4</answer>", 1),
        ("<answer>4</answer> <think>2 + 2</think>", 0),
        ("<think>2 + 2</think>", 0),
        ("<think> </think> <answer>4</answer>", 0),
        ("<think>2</think> <answer>4</answer> so it is", 0),
        ("so: <think>2</think> <answer>4</answer>", 0),
        ("<think>2</think> and <answer>4</answer>", 0),
        ("<think>2</think> <answer>4</answer> <answer>5</answer>", 0),
        ("<think>2 <think> 3</think> <answer>4</answer>", 0),
        ("<think>2 <answer>4</answer>", 0),
        ("", 0),
    ],
)
def test_tags(text: str, expected: int) -> None:
    assert tags_in_order(text, ["think", "answer"]) == expected


def test_names_of_tags_are_no_patterns() -> None:
    assert tags_in_order("<a.b>1</a.b>", ["a.b"]) == 1 and tags_in_order("<axb>1</axb>", ["a.b"]) == 0


def test_overlong() -> None:
    assert [overlong(n, 4) for n in (0, 4, 5, 6, 8, 100)] == [0, 0, -0.25, -0.5, -1, -1]


def test_patterns_and_tagged_answers() -> None:
    assert pattern_found("it is 42.", re.compile(r"\d+")) == 1 and pattern_found("none", re.compile(r"\d+")) == 0
    assert between_tags("<answer> 4 </answer> no, <answer>\n5</answer>", "answer") == "5"
    assert between_tags("<answer>4", "answer") is None
