"""Tasks of reasoning-gym: drawn from the generator alone, with different rows, right answers, and refusals in words."""

import sys

import numpy as np
import pytest

from lightning_ft import Refusal
from lightning_ft.data.reasoning_tasks import reasoning_tasks

reasoning_gym = pytest.importorskip("reasoning_gym")

NAMES = ["letter_counting", "chain_sum", "count_bits"]


def drawn(seed=0, count=6, **options):
    return reasoning_tasks(np.random.default_rng(seed), count, **{"datasets": NAMES, "shot": 3, "query": 2, **options})


def test_tasks_follow_from_the_generator_and_share_no_row():
    tasks = drawn()
    assert tasks == drawn() and tasks != drawn(1)
    for task in tasks:
        rows = [*task["support"], *task["query"]]
        assert len(task["support"]) == 3 and len(task["query"]) == 2
        assert len({row["prompt"][0]["content"] for row in rows}) == 5
        assert all(len(row["completion"][0]["content"]) <= 40 for row in rows)
    assert len({task["support"][0]["prompt"][0]["content"] for task in tasks}) == 6


def test_answers_are_right_by_the_data_sets_own_score():
    (task,) = drawn(count=1, datasets=["chain_sum"], chat=False)
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for row in task["query"]:
        sum_ = row["prompt"].split(":")[-1].replace("=", "").strip()
        assert int(row["completion"]) == eval(sum_)
        assert score(answer=row["completion"], entry={"answer": row["completion"], "metadata": {}}) == 1.0


def test_settings_of_a_data_set():
    rows = drawn(count=2, datasets={"chain_sum": {"min_terms": 2, "max_terms": 2}}, chat=False)
    assert all(row["prompt"].count("+") + row["prompt"].count(" - ") == 1 for task in rows for row in task["support"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"datasets": ["chain_sums"]}, "no data set 'chain_sums'; did you mean chain_sum"),
        ({"datasets": []}, "names nothing"),
        ({"datasets": {"chain_sum": {"terms": 2}}}, "refuses the settings {'terms': 2} of chain_sum"),
        ({"datasets": ["chain_sum"], "longest_answer": 0}, "only 0 differ"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(Refusal, match=said):
        drawn(**options)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(Refusal, match="pip install"):
        drawn()
