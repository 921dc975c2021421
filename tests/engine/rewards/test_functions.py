"""Functions, rules and verifiers: what they get, what they give, and how one that fails is told of."""

from __future__ import annotations

import math
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ft import Refusal
from lightning_ft.engine.rewards import Completions, Reward, Rewards
from lightning_ft.engine.time_limit import TooLong, within


def answers(*texts: str, **columns: list[Any]) -> Completions:
    return Completions(
        prompts=[f"ask {n}" for n in range(len(texts))],
        texts=list(texts),
        prompt_ids=[[1, 2]] * len(texts),
        ids=[[3] * len(text) for text in texts],
        ended=[True] * len(texts),
        rows=[10 + n for n in range(len(texts))],
        columns=columns,
    )


THREE = answers("a", "bb", "ccc", goal=[1, 2, 9])


def test_weights_and_what_is_not_judged() -> None:
    rewards = Rewards({
        "length": lambda completions: [float(len(text)) for text in completions],
        "some": Reward(function=lambda completions: [None, 1.0, None], weight=-2.0),
    })  # fmt: skip
    scores = rewards.score(THREE)
    assert scores.total.tolist() == [1.0, 0.0, 3.0]
    assert scores.each["length"].tolist() == [1.0, 2.0, 3.0]
    assert scores.each["some"].isnan().tolist() == [True, False, True]
    alone = Rewards({"some": lambda completions: [None, 1.0, None]}).score(THREE)
    assert alone.total.isnan().tolist() == [True, False, True] and float(alone.total[1]) == 1.0
    assert rewards.score(answers()).total.shape == (0,)


def test_a_function_gets_the_columns_that_it_names() -> None:
    seen: dict[str, Any] = {}

    def named(prompts: list[str], completions: list[str], goal: list[int]) -> list[float]:
        seen["named"] = (prompts, completions, goal)
        return [0.0] * len(prompts)

    def everything(completions: list[str], **rest: Any) -> torch.Tensor:
        seen["everything"] = rest
        return torch.ones(len(completions))

    rewards = Rewards({"named": named, "everything": everything})
    rewards.check(["goal", "other"])
    assert rewards.score(THREE).total.tolist() == [1.0, 1.0, 1.0]
    assert seen["named"] == (["ask 0", "ask 1", "ask 2"], ["a", "bb", "ccc"], [1, 2, 9])
    assert set(seen["everything"]) == {"prompts", "goal", "completion_ids", "ended"}
    with pytest.raises(
        Refusal, match=r"The reward named wants goal, which is no column of the data \(they have other\)"
    ):
        rewards.check(["other"])


def test_from_a_file_and_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
    assert Rewards({"a": Reward(function=f"{file}:short")}).score(THREE).total.tolist() == [-1, -2, -3]
    (tmp_path / "some_rewards_package.py").write_text(file.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert Rewards({"a": Reward(function="some_rewards_package.short")}).score(THREE).total.tolist() == [-1, -2, -3]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{}/mine.py:long", "has no function 'long'; it has short"),
        ("{}/other.py:short", "There is no file"),
        ("{}/broken.py:f", "cannot be imported: ZeroDivisionError"),
        ("{}/mine.py", "names no function"),
        ("short", "names no function"),
        ("no_such_package.rewards.f", "cannot be imported .*No module named 'no_such_package'"),
        ("math.pi", "math has no function 'pi'"),
    ],
)
def test_functions_that_are_not_there(tmp_path: Path, where: str, message: str) -> None:
    (tmp_path / "mine.py").write_text("def short(completions):\n    return [0] * len(completions)\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(Refusal, match=message):
        Rewards({"a": Reward(function=where.format(tmp_path))}).check()


def test_one_that_raises_names_the_answer() -> None:
    def picky(completions: list[str]) -> list[float]:
        if "bb" in completions:
            raise KeyError("no score for bb")
        return [0.0] * len(completions)

    with pytest.raises(
        Refusal, match=r"The reward picky raised KeyError .*at the answer 'bb' to 'ask 1' \(row 11 of the data\)"
    ):
        Rewards({"picky": picky}).score(THREE)


def test_one_that_fails_on_all_together_only() -> None:
    def several(completions: list[str]) -> list[float]:
        raise RuntimeError("too many") if len(completions) > 1 else StopIteration

    def whole(completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(Refusal, match="at the answer 'a'"):
        Rewards({"several": several}).score(THREE)
    with pytest.raises(Refusal, match="though at none of 3 answers alone"):
        Rewards({"whole": whole}).score(THREE)


@pytest.mark.parametrize("main", [True, False], ids=["alarm", "thread"])
def test_one_that_hangs_names_the_answer(main: bool) -> None:
    over = threading.Event()

    def slow(completions: list[str]) -> list[float]:
        try:
            if "ccc" in completions:
                over.wait(30)
        except Exception:  # what a careless function does
            over.wait(30)
        return [0.0] * len(completions)

    def score() -> None:
        with pytest.raises(Refusal, match=r"longer than its timeout of 0.2 seconds for 3 answers, at the answer 'ccc'"):
            Rewards({"slow": Reward(function=slow, timeout=0.2)}).score(THREE)

    before = time.monotonic()
    if main:
        score()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(score).result()
    over.set()
    assert time.monotonic() - before < 10


def test_an_alarm_that_was_set_before_goes_on() -> None:
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    before = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert within(5, lambda: 7) == 7
        with pytest.raises(TooLong):
            within(0.05, lambda: time.sleep(5))
        assert not rung and 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.3
        time.sleep(0.4)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "good", [1.0]])
def test_what_is_no_reward_names_the_answer(value: Any) -> None:
    with pytest.raises(Refusal, match=r"The reward odd gave .* for the answer 'bb' to 'ask 1' \(row 11"):
        Rewards({"odd": lambda completions: [0.0, value, 1.0]}).score(THREE)


@pytest.mark.parametrize("given", [[1.0], 3.0, None])
def test_another_number_of_rewards(given: Any) -> None:
    with pytest.raises(Refusal, match="for 3 answers; it must give a list with one for each"):
        Rewards({"odd": lambda completions: given}).score(THREE)


def test_rules() -> None:
    some = answers("<think>x</think><answer>4</answer>", "12345", "no", answer=["4", "5", "6"])
    rewards = Rewards({
        "digits": {"regex": r"^\d+$"}, "form": {"tags": ["think", "answer"], "weight": 0.5}, "short": {"length": 4, "weight": 2.0}
    })  # fmt: skip
    scores = rewards.score(some)
    assert scores.each["digits"].tolist() == [0, 1, 0] and scores.each["form"].tolist() == [1, 0, 0]
    assert scores.each["short"].tolist() == [-1, -0.25, 0] and scores.total.tolist() == [-1.5, 0.5, 0]


def test_a_pattern_that_never_ends() -> None:
    hopeless = Rewards({"slow": Reward(regex=r"(a+)+$", timeout=0.1)})
    assert hopeless.score(answers("aaa")).total.tolist() == [1.0]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_verifier_is_reasoning_gym_s_own(as_text: bool) -> None:
    import json

    import reasoning_gym

    data = reasoning_gym.create_dataset("chain_sum", size=3, seed=5)
    entries = [data[i] for i in range(3)]
    said = [entries[0]["answer"], f"<answer> {entries[1]['answer']} </answer>", "I do not know"]
    metadata = [json.dumps(e["metadata"]) if as_text else e["metadata"] for e in entries]
    some = answers(
        *said, question=[e["question"] for e in entries], answer=[e["answer"] for e in entries], metadata=metadata
    )
    whole = Rewards({"sum": Reward(verifier="chain_sum")})
    whole.check(some.columns)
    expected = [data.score_answer(text, entry) for text, entry in zip(said, entries, strict=True)]
    assert whole.score(some).total.tolist() == expected and expected[0] == 1.0
    tagged = Rewards({"sum": Reward(verifier="chain_sum", answer_tag="answer")}).score(some).total
    assert tagged.tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(Refusal, match="no column metadata"):
        whole.check(["question", "answer"])
    with pytest.raises(Refusal, match="no task 'chain_sums'; did you mean chain_sum"):
        Rewards({"sum": Reward(verifier="chain_sums")}).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got none"),
        ({"regex": "a", "length": 3}, "got regex and length"),
        ({"regex": "("}, "no regular expression"),
        ({"tags": []}, "Reward.tags must be"),
        ({"tags": ["a", "a"]}, "Reward.tags must be"),
        ({"tags": ["<a>"]}, "Reward.tags must be"),
        ({"length": 0}, "greater than 0"),
        ({"length": 3, "weight": math.inf}, "weight must be finite"),
        ({"length": 3, "timeout": 0}, "greater than 0"),
        ({"length": 3, "label": "good"}, "Reward.label belongs to a classifier, and this reward is a length"),
        ({"regex": "a", "answer_tag": "b"}, "belongs to a verifier"),
        ({"lenth": 3}, "there is no field lenth; did you mean length"),
        ({"weight": 2.0}, "got none"),
    ],
)
def test_rewards_that_are_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=f"^The reward it: .*{message}"):
        Rewards({"it": fields})


def test_a_reward_of_python_that_is_none_is_named_too() -> None:
    with pytest.raises(Refusal, match="^The reward it: a reward comes from one of function, .*, got none; give each"):
        Rewards({"it": Reward(weight=2.0)})
    with pytest.raises(Refusal, match="^The reward it: Reward.label belongs to a classifier"):
        Rewards({"it": Reward(length=3, label="good")})
    with pytest.raises(Refusal, match="^The reward it: it must be a Reward, its fields or a function, got 3"):
        Rewards({"it": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("given", [{}, [1], {"total": {"length": 3}}, {"a b": {"length": 3}}, {"a": 3}])
def test_names(given: Any) -> None:
    with pytest.raises(Refusal):
        Rewards(given)


def test_in_plain_types() -> None:
    rewards = Rewards({"form": {"tags": ["a"], "weight": 0.5}, "mine": math.fsum})
    assert rewards.plain() == {"form": {"tags": ["a"], "weight": 0.5}, "mine": {"function": "math.fsum"}}
    assert Rewards(rewards.plain()).given["form"] == rewards.given["form"]


def failing_on_one_rank() -> str:
    import torch.distributed as dist

    rank = dist.get_rank()
    rewards = Rewards({"odd": lambda completions: [1.0 if rank == 0 else math.nan] * len(completions)})
    try:
        rewards.score(answers("a"))
    except Refusal as refusal:
        return str(refusal)
    return "nothing"


def test_all_ranks_are_told(two_ranks) -> None:
    found = two_ranks.run("tests.engine.rewards.test_functions:failing_on_one_rank")
    assert found[0] == found[1] and "The reward odd gave nan for the answer 'a'" in found[0]
