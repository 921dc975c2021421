"""The log of answers: a line each, whole whatever a kill has left, and never read twice by one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_ft.data.rollouts.answer_log import AnswerLog
from lightning_ft.engine.rewards import Scores
from lightning_ft.engine.rollouts.round import Prompt, Round
from lightning_ft.engine.sampling import Answer


def played(number: int, *texts: str) -> Round:
    total = torch.tensor([float("nan"), *(float(n) for n in range(1, len(texts)))], dtype=torch.float64)
    answers = [Answer([1], True) for _ in texts]
    prompts = [Prompt(0, "a\nb", [1])]
    return Round(number, len(texts), prompts, answers, list(texts), Scores(total, {}), torch.ones(len(texts)))


def read(file: Path) -> list[tuple[int, str, float | None]]:
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [(one["round"], one["answer"], one["reward"]) for one in map(json.loads, lines)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "rollouts.jsonl"


def test_some_answers_of_each_round(file: Path) -> None:
    log = AnswerLog()
    log.write(file, played(0, "x", "y", "z"), 2)
    log.write(file, played(1, "line\u2028break\nö"), 2)
    assert read(file) == [(0, "x", None), (0, "y", 1.0), (1, "line\u2028break\nö", None)]
    AnswerLog().write(file, played(0, "anew"), 2)
    assert read(file) == [(0, "anew", None)]


@pytest.mark.parametrize("torn", [b'{"round": 2, "pro', '{"round": 2, "answer": "ö'.encode()[:-1], b"{"])
def test_half_a_line_that_a_kill_has_left(file: Path, torn: bytes) -> None:
    log = AnswerLog()
    for number in range(2):
        log.write(file, played(number, f"{number}\u2028ö"), 4)
    with file.open("ab") as opened:
        opened.write(torn)
    AnswerLog().write(file, played(2, "goes on"), 4)
    assert read(file) == [(0, "0\u2028ö", None), (1, "1\u2028ö", None), (2, "goes on", None)]


def test_a_round_that_is_written_again_stands_there_once(file: Path) -> None:
    log = AnswerLog()
    for number in range(3):
        log.write(file, played(number, f"{number}"), 4)
    AnswerLog().write(file, played(1, "1"), 4)
    assert read(file) == [(0, "0", None), (1, "1", None)]


def test_a_run_reads_the_file_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the cost of a round does not grow with the rounds before it."""
    AnswerLog().write(file, played(0, "0"), 4)
    log, asked = AnswerLog(), []
    own = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (asked.append(self), own(self))[1])
    for number in range(1, 5):
        log.write(file, played(number, f"{number}"), 4)
    assert asked == [file] and [number for number, _, _ in read(file)] == [0, 1, 2, 3, 4]


def test_earlier_rounds_survive_a_kill_in_writing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AnswerLog().write(file, played(0, "0"), 4)
    before = file.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_ft.formats.atomic.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        AnswerLog().write(file, played(1, "1"), 4)
    assert file.read_bytes() == before
