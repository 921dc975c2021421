"""GRPO: odd rounds, in which answers are cut, not judged or all alike, and a bandit whose optimum is known."""

import json
import math

import pytest
import torch

from benchmarks.random_model import write_model
from lightning_ft import GRPO, LoRA, PromptData
from tests.modules.rollouts import FP32, Stir, constant, fit, play, sevens, write_prompts


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("grpo_rounds"))


# -- odd rounds -------------------------------------------------------------------------------------------------------------


def test_a_round_without_signal_changes_nothing(job, tmp_path):
    module, watch, made = play(job, tmp_path, LoRA(r=4), rewards={"constant": constant}, beta=0.1)
    assert float(made.callback_metrics["train/without_signal"]) == 1.0
    assert float(made.callback_metrics["train/trained_share"]) == 0.0
    assert math.isnan(float(made.callback_metrics["train/kl"])), "no answer was measured"
    assert all(loss == 0.0 for loss in watch.losses)
    assert all(not bool(gradient.any()) for step in watch.gradients for gradient in step.values())


def test_groups_without_signal_are_dropped_or_counted(job, tmp_path):
    """Half the prompts get the same reward for all answers: dropped, the mean runs over the others alone."""

    def half(completions, answer, **columns):
        return [value if int(row) % 2 else 1.0 for value, row in zip(sevens(completions), answer, strict=True)]

    runs = {}
    for drop in (True, False):
        folder = tmp_path / str(drop)
        _, runs[drop], _ = play(
            job, folder, LoRA(r=4), Stir(), rewards={"half": half}, drop_without_signal=drop, data={"shuffle": False}
        )
    kept, both = runs[True].rounds[0], runs[False].rounds[0]
    assert kept.kept.tolist() == ([False] * 4 + [True] * 4) * 2 and bool(both.kept.all())
    share = float(kept.lengths[kept.kept].sum() / kept.lengths.sum())
    for name, gradient in runs[True].gradients[0].items():
        torch.testing.assert_close(runs[False].gradients[0][name], gradient * share, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("ends", [False, True], ids=["all cut", "some end"])
def test_truncated_answers_are_masked(job, tmp_path, ends):
    """Those that ended train alone; where none did, nothing is trained."""
    stop = [chr(c) for c in range(32, 127)] if ends else None
    _, watch, made = play(job, tmp_path, LoRA(r=4), mask_truncated=True, max_new_tokens=2, stop_strings=stop)
    round = watch.rounds[0]
    if not ends:
        assert not bool(round.ended.any()) and not bool(round.kept.any()) and watch.losses == [0.0, 0.0]
        assert float(made.callback_metrics["train/truncated"]) == 1.0
        return
    assert 0 < int(round.ended.sum()) < 16, "the test needs both kinds"
    assert bool((round.kept <= round.ended).all()) and bool(round.kept.any())
    trained = sum(len(answer.ids) for answer, kept in zip(round.answers, round.kept.tolist(), strict=True) if kept)
    assert watch.batches[0].counts["token"] == trained == len(watch.batches[0].scored)
    cut = [text for text, ended in zip(round.texts, round.ended.tolist(), strict=True) if ended]
    assert all(not any(one in text for one in stop) for text in cut), "the text stops before the stop string"


def test_an_answer_that_nobody_judged_is_left_out(job, tmp_path):
    def some(completions, **columns):
        return [None if n % 4 == 1 else value for n, value in enumerate(sevens(completions))]

    def other(completions, **columns):
        return [None if n % 4 in (1, 2) else 1.0 for n, _ in enumerate(completions)]

    rewards = {"some": {"function": some, "weight": 2.0}, "other": {"function": other, "weight": -1.0}}
    _, watch, _ = play(job, tmp_path, LoRA(r=4), rewards=rewards, drop_without_signal=False)
    round = watch.rounds[0]
    assert round.kept.tolist() == [True, False, True, True] * 4
    each = round.scores.each
    for answer in range(16):
        expected = 2 * float(each["some"][answer]) - (0.0 if answer % 4 == 2 else 1.0)
        assert math.isnan(float(round.scores.total[answer])) if answer % 4 == 1 else True
        if answer % 4 != 1:
            assert float(round.scores.total[answer]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"importance": "sequence", "loss": "grpo"}, "32-true"),
        ({"base_dtype": "bfloat16"}, "bf16-mixed"),
        ({"base_dtype": "bfloat16", "importance": "sequence"}, "bf16-true"),
    ],
    ids=["sequence", "bf16", "bf16 sequence"],
)
def test_the_first_update_of_every_round_finds_the_policy_that_wrote(job, tmp_path, settings, precision):
    data, options = {"passes": 2, "batch_size": 8}, {"precision": precision}
    _, watch, _ = play(job, tmp_path, LoRA(r=4), Stir(), data=data, options=options, lr=0.1, **settings)
    assert len(watch.rounds) == 2 and len(watch.logged) == 8
    for step in (0, 4):
        logged = watch.logged[step]
        assert logged["train/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert logged["train/policy_kl"] == logged["train/clipped_low"] == logged["train/clipped_high"] == 0.0
    assert all(abs(watch.logged[step]["train/ratio"] - 1) > 1e-4 for step in (3, 7))


# -- learning --------------------------------------------------------------------------------------------------------------

TABLE = {"a": (1.0, 0.2, 0.0), "b": (0.1, 0.0, 0.8), "c": (0.3, 0.9, 0.5)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"advantage": "rloo", "loss": "dr_grpo"},
        {"loss": "grpo", "importance": "sequence"},
        {"advantage": "reinforce++"},
    ],
    ids=["dapo", "rloo", "gspo", "reinforce++"],
)
def test_a_bandit_with_three_states_is_learned(tmp_path, settings):
    """One token an answer; which of three actions it is its number says. The best mean reward is that of the best actions."""
    write_model(tmp_path / "model", initializer_range=0.2, hidden_size=16, num_attention_heads=2)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": s, "state": s}) + "\n" for s in TABLE))

    def pays(completion_ids, state, **columns):
        return [TABLE[s][ids[0] % 3] for ids, s in zip(completion_ids, state, strict=True)]

    module = GRPO(
        str(tmp_path / "model"), rewards={"pays": pays}, samples=16, max_new_tokens=1, lr=0.02, **FP32, **settings
    )
    data = PromptData(str(tmp_path / "prompts.jsonl"), prompts=3, batch_size=48, cache_dir=str(tmp_path / "cache"))
    fit(tmp_path, module, data, max_epochs=40)
    total = 0.0
    for state, row in TABLE.items():
        ids = torch.tensor([module.tokenizer(state)["input_ids"]])
        with torch.no_grad():
            chances = module.model(ids).logits[0, -1].double().softmax(-1)
        total += sum(row[action] * float(chances[action::3].sum()) for action in range(3)) / 3
    best = sum(max(row) for row in TABLE.values()) / 3
    assert total > 0.98 * best, f"{total:.3f} of {best:.3f}"
