"""Rewards that are ``async def``: asked all at once, and told of like any other when they fail."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch

from lightning_ft import Refusal
from lightning_ft.engine.rewards import Reward, Rewards
from tests.engine.rewards.test_functions import THREE, answers


def test_all_wait_at_the_same_time_while_others_are_asked() -> None:
    here, order = [0], []

    async def meet(name: str, completions: list[str]) -> list[float]:
        here[0] += 1
        while here[0] < 2:  # ends only if both are asked before either has answered
            await asyncio.sleep(0.001)
        order.append(name)
        return [float(len(text)) for text in completions]

    async def one(completions: list[str], goal: list[int]) -> list[float]:
        assert goal == [1, 2, 9]
        return await meet("one", completions)

    async def other(completions: list[str], **columns: Any) -> torch.Tensor:
        return torch.tensor(await meet("other", completions))

    def plain(completions: list[str]) -> list[float]:
        order.append("plain")
        return [1.0] * len(completions)

    rewards = Rewards({
        "one": Reward(function=one, weight=10.0, timeout=20), "plain": plain, "other": Reward(function=other, timeout=20)
    })  # fmt: skip
    scores = rewards.score(THREE)
    assert list(scores.each) == ["one", "plain", "other"]  # as they were given, however they were asked
    assert scores.total.tolist() == [12.0, 23.0, 34.0] and sorted(order) == ["one", "other", "plain"]
    assert rewards.score(answers(goal=[])).total.shape == (0,)


def test_inside_of_a_loop_that_runs_already() -> None:
    async def length(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def notebook() -> list[float]:
        return Rewards({"length": length}).score(THREE).total.tolist()  # type: ignore[no-any-return]

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0]


def test_an_object_whose_call_waits() -> None:
    class Service:
        async def __call__(self, completions: list[str]) -> list[float | None]:
            await asyncio.sleep(0)
            return [None, *[1.0] * (len(completions) - 1)]

    assert Rewards({"service": Service()}).score(THREE).total.isnan().tolist() == [True, False, False]


def test_failures_name_the_reward_and_the_answer() -> None:
    async def raises(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        if "bb" in completions:
            raise TimeoutError("the service is busy")
        return [0.0] * len(completions)

    async def hangs(completions: list[str]) -> list[float]:
        if "ccc" in completions:
            await asyncio.sleep(60)
        return [0.0] * len(completions)

    async def fine(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    before = time.monotonic()
    with pytest.raises(
        Refusal, match=r"The reward raises raised TimeoutError \(the service is busy\), at the answer 'bb'"
    ):
        Rewards({"fine": fine, "raises": raises}).score(THREE)
    with pytest.raises(
        Refusal, match=r"The reward hangs took longer than its timeout of 0.2 seconds .* at the answer 'ccc'"
    ):
        Rewards({"fine": fine, "hangs": Reward(function=hangs, timeout=0.2)}).score(THREE)
    with pytest.raises(Refusal, match=r"The reward odd gave nan for the answer 'a'"):

        async def odd(completions: list[str]) -> list[float]:
            return [float("nan")] * len(completions)

        Rewards({"odd": odd}).score(THREE)
    assert time.monotonic() - before < 20


def test_one_that_blocks_the_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ft.engine.rewards import waiting

    monkeypatch.setattr(waiting, "_GRACE", 0.1)

    async def blocks(completions: list[str]) -> list[float]:
        if "bb" in completions:
            time.sleep(4)  # not awaited: nothing else in the loop goes on
        return [0.0] * len(completions)

    async def fine(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [0.0] * len(completions)

    both = {"fine": Reward(function=fine, timeout=0.3), "blocks": Reward(function=blocks, timeout=0.3)}
    with pytest.raises(Refusal, match=r"The reward blocks took longer than its timeout .* at the answer 'bb'"):
        Rewards(both).score(THREE)
