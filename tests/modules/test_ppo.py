"""PPO: what a round's first update must find, its values, KL and ends; the same step however laid out; resumed, loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from benchmarks.random_model import write_model
from lightning_ft import PPO, Freeze, LoRA, PromptData, Refusal
from lightning_ft.engine.scoring import scores
from lightning_ft.functional.kl_estimators import adapted
from tests.contract.subjects import differing, trainer
from tests.modules.ppo_jobs import play, ppo
from tests.modules.preference import weights
from tests.modules.rollouts import Watch, sevens, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
FIRST = {"train/ratio": 1.0, "train/clipped_low": 0.0, "train/clipped_high": 0.0, "train/clipped_values": 0.0}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def whole(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    module, watch, made = play(job, tmp_path_factory.mktemp("whole"), options={"max_epochs": 3})
    return module, watch, made


# -- the first update of every round --------------------------------------------------------------------------------------


def test_the_first_update_of_every_round_finds_the_policy_that_wrote(whole: Any) -> None:
    _, watch, _ = whole
    assert len(watch.rounds) == 3 and len(watch.logged) == 12
    for number in range(3):
        first, later = watch.logged[4 * number], watch.logged[4 * number + 3]
        for name, value in FIRST.items():
            assert first[name] == pytest.approx(value, abs=1e-6), (number, name)
        assert abs(first["train/policy_kl"]) < 1e-9
        assert abs(later["train/ratio"] - 1) > 1e-4 and later["train/policy_kl"] > 1e-7, "nothing moved"


def test_so_it_is_on_a_base_with_dropout(tmp_path: Path) -> None:
    """Dropout that the base brings is switched off."""
    place = write_prompts(tmp_path)
    write_model(place / "model", initializer_range=0.2, attention_dropout=0.5)
    module, watch, _ = play(place, tmp_path)
    for first in (watch.logged[0], watch.logged[4]):
        assert {name: first[name] for name in FIRST} == pytest.approx(FIRST, abs=1e-6)
    assert watch.rounds[0].facts["kl_k3"] == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_so_it_is_in_sixteen_bits(job: Path, tmp_path: Path, precision: str) -> None:
    """What is compared was measured as training computes, not while writing."""
    module, watch, _ = play(job, tmp_path, base_dtype="bfloat16", options={"precision": precision})
    for first in (watch.logged[0], watch.logged[4]):
        assert {name: first[name] for name in FIRST} == pytest.approx(FIRST, abs=1e-6)
    assert watch.rounds[0].facts["kl_k3"] == 0 and watch.rounds[1].facts["kl_k3"] > 0
    assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)


def test_the_kl_to_the_reference_is_0_in_the_first_round_only(whole: Any) -> None:
    facts = [round.facts for round in whole[1].rounds]
    assert facts[0]["kl"] == facts[0]["kl_k1"] == facts[0]["kl_k3"] == 0.0
    assert all(one["kl_k3"] > 1e-5 for one in facts[1:])


def test_a_new_value_head_expects_nothing(whole: Any) -> None:
    first, second = whole[1].rounds[:2]
    assert not first.tokens["old_values"].any() and second.tokens["old_values"].abs().min() > 0
    assert first.facts["explained_variance"] == pytest.approx(0.0, abs=1e-6)


# -- what was measured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_advantages_of_a_whole_round_by_hand(job: Path, tmp_path: Path, chat: bool) -> None:
    """From the log-probabilities that the saved policy and the base give, answer by answer.

    In a chat the end of turn, which is also what the model pads with nowhere, stands within the prompt already.
    """
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    data, options = {"chat": chat}, {"enable_checkpointing": True}
    _, watch, _ = play(job, tmp_path, LoRA(r=4), save, data=data, beta=0.3, temperature=1.5, options=options)
    module, round = lightning_ft.load(tmp_path / "saved/step=4.ckpt"), watch.rounds[1]
    assert 0 < int(round.ended.sum()) < len(round.answers), "both kinds of answers are wanted"
    assert (module.tokenizer.eos_token_id in round.prompts[0].ids) == chat
    expected: list[float] = []
    for number, answer in enumerate(round.answers):
        prompt = round.prompts[number // 2].ids
        ids = torch.tensor([[*prompt, *answer.ids]])
        places = slice(len(prompt) - 1, ids.shape[1] - 1)

        def logps(ids: Any = ids, places: slice = places, own: Any = answer.ids) -> list[float]:
            logits = module.model(ids).logits[0, places].double() / 1.5
            return logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)].tolist()

        with torch.no_grad():
            now = logps()
            values = module.values(module.view.hidden(ids)[0, places]).tolist()
            with module.reference("base"):
                before = logps()
        rewards = [-0.3 * (p - q) for p, q in zip(now, before, strict=True)]
        rewards[-1] += sevens([round.texts[number]])[0] - (0.0 if answer.ended else 0.5)
        carried, found = 0.0, []
        for t in reversed(range(len(rewards))):
            following = values[t + 1] if t + 1 < len(values) else 0.0
            carried = rewards[t] + following - values[t] + 0.95 * carried
            found.append(carried)
        expected += found[::-1]
    mean = sum(expected) / len(expected)
    spread = math.sqrt(sum((x - mean) ** 2 for x in expected) / len(expected))
    wanted = torch.tensor([(x - mean) / spread for x in expected])
    torch.testing.assert_close(round.tokens["advantages"], wanted, rtol=1e-4, atol=1e-4)


def test_all_answers_cut(job: Path, tmp_path: Path) -> None:
    _, watch, _ = play(job, tmp_path, stop_strings=None, rewards={"one": {"function": _ones}}, beta=0.0)
    for round in watch.rounds:
        assert not round.ended.any() and round.facts["truncated"] == 1.0 and math.isnan(round.facts["length_ended"])
    torch.testing.assert_close(
        watch.rounds[0].tokens["returns"][4], torch.tensor(0.5)
    )  # 1 - the penalty, at the last of 5
    assert all(math.isfinite(loss) for loss in watch.losses)


def _ones(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def test_whitened_over_the_round(whole: Any) -> None:
    for round in whole[1].rounds:
        advantages = round.tokens["advantages"].double()
        assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
        assert float(advantages.var(correction=0)) == pytest.approx(1.0, rel=1e-4)


# -- the KL's coefficient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_the_coefficient_follows_the_kl_of_the_round_before(job: Path, tmp_path: Path, kl: str) -> None:
    _, watch, _ = play(job, tmp_path, kl=kl, beta=0.2, kl_target=0.01, kl_horizon=50.0, options={"max_epochs": 4})
    facts = [round.facts for round in watch.rounds]
    expected = 0.2
    for before in facts[:-1]:
        assert before["kl_coefficient"] == pytest.approx(expected)
        expected = adapted(expected, before["kl"], target=0.01, horizon=50.0, steps=12)
    assert facts[-1]["kl_coefficient"] == pytest.approx(expected) and expected != 0.2
    first = watch.logged[0]
    assert ("train/kl_loss" in first) == (kl == "loss")
    if kl == "loss":
        last, weight = watch.logged[-1], facts[-1]["kl_coefficient"]
        parts = last["train/policy"] + 0.1 * last["train/value"] + weight * last["train/kl_loss"]
        assert last["train/loss"] == pytest.approx(parts, rel=1e-5)


def test_without_a_kl_no_reference_is_run(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any) -> Any:
        raise AssertionError("the reference was run")

    monkeypatch.setattr(PPO, "at_reference", never)
    _, watch, _ = play(job, tmp_path, beta=0.0)
    assert "kl" not in watch.rounds[0].facts and "reference_logps" not in watch.rounds[0].tokens


def test_entropy_is_raised_when_asked(job: Path, tmp_path: Path) -> None:
    module, watch, _ = play(job, tmp_path, entropy_weight=0.5, beta=0.0)
    batch = watch.batches[-1]
    with torch.no_grad():
        entropy = scores(module.view, batch, ("entropy",))["entropy"].mean()
    first = watch.logged[0]
    assert first["train/entropy_bonus"] == pytest.approx(-first["train/entropy"], rel=1e-5)
    assert float(entropy) > first["train/entropy"] - 0.2


# -- the same step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "model", "options"),
    [
        ({"share_prompts": False}, {}, {}),
        ({"packing": False}, {}, {}),
        ({"batch_size": 2}, {}, {"accumulate_grad_batches": 3}),
        ({}, {"gradient_checkpointing": True}, {}),
    ],
    ids=["separate prompts", "padded", "accumulated", "checkpointed"],
)
def test_the_same_rounds_and_steps(job: Path, tmp_path: Path, whole: Any, data: Any, model: Any, options: Any) -> None:
    module, watch, _ = play(job, tmp_path, data=data, options={"max_epochs": 3, **options}, **model)
    truth, expected, _ = whole
    for round, other in zip(watch.rounds, expected.rounds, strict=True):
        assert [a.ids for a in round.answers] == [a.ids for a in other.answers]
        torch.testing.assert_close(round.tokens["advantages"], other.tokens["advantages"], rtol=1e-3, atol=1e-3)
    for name, value in weights(truth).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("strategy", "full"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_ranks_are_as_one(job: Path, tmp_path: Path, two_ranks: Any, strategy: str, full: bool) -> None:
    from tests.modules.ppo_jobs import on_ranks

    asked = {"job": str(job), "folder": str(tmp_path), "full": full, "kl_target": 0.01, "kl_horizon": 50.0}
    found = two_ranks.run("tests.modules.ppo_jobs:on_ranks", devices=2, strategy=strategy, **asked)
    alone = on_ranks(devices=1, strategy="auto", **asked)
    for one in found:
        assert one["answers"] == alone["answers"]
        for mine, truth in zip(one["advantages"], alone["advantages"], strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(one["weights"][name], value, rtol=1e-3, atol=1e-4)
        assert one["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=1e-4, nan_ok=True)


# -- the values -------------------------------------------------------------------------------------------------------------


def test_the_value_head_is_trained_kept_and_loaded_whatever_is_frozen(job: Path, tmp_path: Path) -> None:
    parts = [LoRA(r=2), Freeze(freeze=["norms"])]
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=2)
    model = {"optimizer": None, "lr": 1e-3, "value_lr": 3e-2}
    module, watch, made = play(job, tmp_path, *parts, save, options={"enable_checkpointing": True}, **model)
    names = {"values.weight", "values.bias"}
    assert names <= watch.gradients[0].keys()
    rates = {p: group["lr"] for group in made.optimizers[0].param_groups for p in group["params"]}
    assert {rates[p] for p in module.values.parameters()} == {3e-2}
    assert {rates[p] for n, p in module.named_parameters() if p.requires_grad and n not in names} == {1e-3}
    file = torch.load(tmp_path / "saved/step=8.ckpt", weights_only=True)
    assert names <= file["state_dict"].keys()
    loaded = lightning_ft.load(tmp_path / "saved/step=8.ckpt")
    assert not differing(weights(module), {**weights(loaded)}) and isinstance(loaded, PPO)
    assert bool(loaded.values.weight.any())


def test_a_rate_of_its_own_by_default(job: Path, tmp_path: Path) -> None:
    _, _, made = play(job, tmp_path, value_lr=None, lr=0.01, options={"max_epochs": 1})
    assert sorted({group["lr"] for group in made.optimizers[0].param_groups}) == pytest.approx([0.01, 0.1])


def test_full_training(job: Path, tmp_path: Path) -> None:
    module, watch, _ = play(job, tmp_path, Freeze(freeze=["embeddings"]), lr=0.01)
    assert watch.logged[4]["train/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert watch.rounds[0].facts["kl"] == 0 and watch.rounds[1].facts["kl_k3"] > 0
    assert "model.model.layers.0.mlp.up_proj.weight" in weights(module)


def test_a_model_of_its_own_for_the_values(job: Path, tmp_path: Path) -> None:
    """Trained in full beside LoRA, which does not touch it; zero at first; kept, loaded, and resumed."""
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    given = {"value_model": str(job / "model"), "optimizer": None, "lr": 1e-3, "value_lr": 1e-3}
    module, watch, _ = play(job, tmp_path, LoRA(r=2), save, options={"enable_checkpointing": True}, **given)
    assert not watch.rounds[0].tokens["old_values"].any() and watch.rounds[1].tokens["old_values"].abs().min() > 0
    assert (
        watch.logged[4]["train/ratio"] == pytest.approx(1.0, abs=1e-6) and watch.logged[4]["train/clipped_values"] == 0
    )
    trained = weights(module)
    assert not any("lora" in name for name in trained if name.startswith("values."))
    assert {n for n, _ in module.values.named_parameters()} == {n[7:] for n in trained if n.startswith("values.")}
    assert not any(
        n.startswith("values.") for n in lightning_ft.Attachment.of(module).references.snapshots["start"].tensors
    )
    batch = watch.batches[-1]
    loaded = lightning_ft.load(tmp_path / "saved/step=8.ckpt")
    assert not differing(trained, weights(loaded))
    with torch.no_grad():
        torch.testing.assert_close(loaded.values(batch), module.eval().values(batch))
    again, rows = ppo(job, tmp_path, **given)
    trainer(tmp_path, LoRA(r=2), max_steps=-1, max_epochs=2, limit_val_batches=0).fit(
        again, rows, ckpt_path=tmp_path / "saved/step=4.ckpt"
    )
    assert not differing(trained, weights(again))


def test_values_of_a_reward_model_start_from_its_rewards(job: Path, tmp_path: Path) -> None:
    """A head that the folder brings is kept."""
    import transformers as hf

    folder = tmp_path / "rm"
    torch.manual_seed(1)
    model = hf.AutoModelForSequenceClassification.from_pretrained(job / "model", num_labels=1)
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(job / "model").save_pretrained(folder)
    module, watch, _ = play(job, tmp_path, value_model=str(folder), options={"max_epochs": 1}, lr=1e-9)
    round = watch.rounds[0]
    ids = torch.tensor([[*round.prompts[0].ids, *round.answers[0].ids]])
    with torch.no_grad():
        hidden = model.eval().model(ids).last_hidden_state[0, len(round.prompts[0].ids) - 1 : -1]
        expected = model.score(hidden)[:, 0]
    torch.testing.assert_close(round.tokens["old_values"][: len(expected)], expected, rtol=1e-4, atol=1e-5)


# -- resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_run_goes_on_within_its_round(job: Path, tmp_path: Path, stop: int) -> None:
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    given = {"optimizer": None, "lr": 1e-2, "value_lr": 1e-2, "kl_target": 0.01, "kl_horizon": 50.0, "beta": 0.2}
    options = {"max_epochs": 3}
    unbroken, watch, _ = play(
        job, tmp_path, LoRA(r=4), save, options={**options, "enable_checkpointing": True}, **given
    )
    resumed, rows = ppo(job, tmp_path, **given)
    again = Watch()
    made = trainer(tmp_path, LoRA(r=4), again, max_steps=-1, limit_val_batches=0, **options)
    made.fit(resumed, rows, ckpt_path=tmp_path / f"saved/step={stop}.ckpt")
    assert not differing(weights(unbroken), weights(resumed))
    assert [round.facts["kl_coefficient"] for round in again.rounds] == [
        round.facts["kl_coefficient"] for round in watch.rounds[stop // 4 :]
    ]


# -- quantised and refused ------------------------------------------------------------------------------------------------


def test_on_a_base_in_four_bits(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    module, watch, _ = play(job, tmp_path, LoRA(r=4), quantize="nf4", options={"max_epochs": 2})
    assert watch.logged[4]["train/ratio"] == pytest.approx(1.0, abs=1e-3)
    assert {"values.weight", "values.bias"} <= weights(module).keys() and all(map(math.isfinite, watch.losses))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lam": 1.5}, "PPO.lam must be at most 1"),
        ({"beta": 0.0, "kl_target": 6.0}, "PPO.kl_target moves beta"),
        ({"rewards": {}}, "rewards must name at least one"),
        ({"kl": "both"}, "PPO.kl must be one of"),
        ({"kl_horizon": 500.0}, "PPO.kl_horizon is 500.0, but without kl_target beta stays"),
        ({"correct_kl": False}, "PPO.correct_kl is False, but the KL is in the reward"),
    ],
)
def test_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        PPO("base", **{"rewards": {"short": {"length": 3}}, **given})


def test_a_value_model_with_other_tokens(job: Path, tmp_path: Path) -> None:
    from tests.modules.rewards import write_base

    with pytest.raises(Refusal, match="has other tokens"):
        play(job, tmp_path, value_model=str(write_base("llama", tmp_path / "other")))
    with pytest.raises(Refusal, match="is an encoder"):
        play(job, tmp_path, value_model=str(write_base("bert", tmp_path / "encoder")))


def test_a_reward_that_fails_in_a_round_names_the_answer(job: Path, tmp_path: Path) -> None:
    def breaks(completions: list[str]) -> list[float]:
        return [float("nan")] * len(completions)

    with pytest.raises(Refusal, match=r"The reward breaks gave nan for the answer .* to 'tell .*row"):
        play(job, tmp_path, rewards={"breaks": breaks})


def test_dropout_and_noise_are_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="LoRA.dropout is 0.1"):
        play(job, tmp_path, LoRA(r=2, dropout=0.1))
    from lightning_ft import NEFTune

    with pytest.raises(Refusal, match="PPO cannot work with NEFTune"):
        play(job, tmp_path, LoRA(r=2), NEFTune())


def test_arguments_in_a_checkpoint_are_plain(job: Path, tmp_path: Path) -> None:
    module, rows = ppo(job, tmp_path, rewards={"a": {"length": 3, "weight": 0.5}, "b": sevens})
    assert (module.top_k, module.top_p, module.gamma, module.lam) == (0, 1.0, 1.0, 0.95), "what PPO's ratios suppose"
    assert module.resolved_arguments()["rewards"] == {
        "a": {"length": 3, "weight": 0.5},
        "b": {"function": "tests.modules.rollouts.sevens"},
    }
    assert isinstance(rows, PromptData)
