"""Seeds, shares and ends of answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_model import byte_tokenizer
from lightning_ft.engine.rewards import Scores
from lightning_ft.engine.rollouts.ranks import answer_seed, repeats, shares
from lightning_ft.engine.rollouts.round import Prompt, Round
from lightning_ft.engine.rollouts.stops import StopStrings, end_ids
from lightning_ft.engine.sampling import Answer


def test_every_answer_has_a_seed_of_its_own() -> None:
    keys = [(s, n, r, a, g) for s in range(2) for n in range(3) for r in range(5) for a in range(2) for g in range(4)]
    seeds = [answer_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [answer_seed(*key) for key in keys]
    torch.Generator().manual_seed(max(seeds))


def test_a_row_that_comes_again_is_told_apart() -> None:
    assert repeats([3, 1, 3, 3, 1]) == [0, 0, 1, 2, 1]


@pytest.mark.parametrize(("count", "ranks"), [(5, 2), (4, 4), (1, 3), (7, 1)])
def test_shares(count: int, ranks: int) -> None:
    parts = shares(count, ranks)
    assert [i for part in parts for i in part] == list(range(count)) and len(parts) == ranks
    assert max(map(len, parts)) == len(parts[0]) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_stop_strings() -> None:
    tokenizer = byte_tokenizer()
    stop = StopStrings(tokenizer, ["\n\n", "é!"])

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    assert [stop(ids(text)) for text in ("a", "a\n", "a\n\n", "b\n\nc", "x" * 50 + "é", "x" * 50 + "é!")] == [
        False, False, True, True, False, True,
    ]  # fmt: skip
    assert stop.text(ids("one\n\ntwo")) == "one" and stop.text([*ids("one"), tokenizer.eos_token_id]) == "one"
    assert stop.text(ids("oneé!")) == "one"


def test_what_ends_an_answer() -> None:
    tokenizer = byte_tokenizer()
    for named, expected in ((None, {1}), (7, {1, 7}), ([7, 8], {1, 7, 8})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
        assert end_ids(model, tokenizer) == expected
    assert end_ids(SimpleNamespace(), tokenizer) == {1}


def test_a_round_comes_back_from_its_state(tmp_path) -> None:  # type: ignore[no-untyped-def]
    total = torch.tensor([0.5, float("nan"), 1.0, 0.0], dtype=torch.float64)
    round = Round(
        3,
        2,
        [Prompt(5, "a", [1, 2], {"x": object()}), Prompt(6, [{"role": "user", "content": "b"}], [3])],
        [Answer([4], True), Answer([5, 6], False), Answer([7, 8, 9], True), Answer([1], True)],
        ["d", "e", "f", "g"],
        Scores(total, {"one": total}),
        torch.tensor([True, False, True, False]),
        {"advantages": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"reward": 0.5},
    )
    assert round.owner.tolist() == [0, 2, 2, 2] and round.lengths.tolist() == [1, 2, 3, 1]
    assert round.ended.tolist() == [True, False, True, True] and round.rewards.shape == (2, 2)
    torch.save(round.state(), tmp_path / "round.pt")
    again = Round.of_state(torch.load(tmp_path / "round.pt", weights_only=True))
    assert again.answers == round.answers and again.facts == round.facts and again.texts == round.texts
    assert [(p.row, p.given, p.ids) for p in again.prompts] == [(p.row, p.given, p.ids) for p in round.prompts]
    assert torch.equal(again.kept, round.kept) and torch.equal(again.tokens["advantages"], round.tokens["advantages"])
    torch.testing.assert_close(again.scores.total, total, equal_nan=True)
