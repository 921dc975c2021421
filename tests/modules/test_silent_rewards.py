"""Answers that nobody judges: left out; refused where that is all of the first round; a reward that judges none is told of."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_ft import LoRA, Refusal
from tests.modules.ppo_jobs import play
from tests.modules.rollouts import sevens, write_prompts


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("silent"))


def _judges_none(completions: list[str]) -> list[None]:
    return [None] * len(completions)


def _judges_some(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if number % 3 == 0 else 1.0 for number in range(len(completions))]


class _JudgesTheFirst:
    """Judges in its first round alone."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, completions: list[str]) -> list[float | None]:
        self.asked += 1
        return [1.0 if self.asked == 1 else None for _ in completions]


@pytest.mark.parametrize(
    ("judge", "kept"), [(_judges_some, [8, 8]), (_JudgesTheFirst(), [12, 0])], ids=["some", "later none"]
)
def test_answers_that_nobody_judged_are_left_out(job: Path, tmp_path: Path, judge: Any, kept: list[int]) -> None:
    module, watch, _ = play(job, tmp_path, rewards={"some": judge}, data={"draw_batch": 6})
    assert [int(round.kept.sum()) for round in watch.rounds] == kept
    assert [round.facts["judged"] for round in watch.rounds] == [one / 12 for one in kept]
    assert all(math.isfinite(loss) for loss in watch.losses) and len(watch.losses) == 8
    for round in watch.rounds:
        assert len(round.tokens["advantages"]) == int(round.lengths[round.kept].sum())


def test_where_nobody_judges_there_is_nothing_to_learn(job: Path, tmp_path: Path) -> None:
    said = r"The reward mute judged none of the 12 answers of the first round, such as the answer '.*' to 'tell .*\(row \d+ of"
    with pytest.raises(Refusal, match=said):
        play(job, tmp_path, rewards={"mute": _judges_none})


def test_a_reward_that_judges_nothing_is_told_of_once(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column that is misspelt in the reward, say: others hide that it never counts."""
    options = {"enable_progress_bar": True, "max_epochs": 3}
    rewards = {"sevens": sevens, "mute": _judges_none}
    _, watch, made = play(job, tmp_path, TQDMProgressBar(), LoRA(r=4), rewards=rewards, options=options)
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.replace("\r", "\n").splitlines() if "judged none" in line]
    assert re.search(
        r"round 0: the reward mute judged none of 12 answers, such as the answer '.*' to 'tell .* \(row \d", line
    )
    assert [(round.facts["judged"], round.facts["judged/mute"]) for round in watch.rounds] == [(1.0, 0.0)] * 3
    assert float(made.callback_metrics["train/judged/sevens"]) == 1.0
