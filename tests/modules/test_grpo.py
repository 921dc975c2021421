"""GRPO: rounds that come from the weights as they are, the same however they are dealt, and resumed exactly."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ft import (
    GRPO,
    IA3,
    MAS,
    SFT,
    BottleneckAdapter,
    Freeze,
    LoRA,
    NEFTune,
    PrefixTuning,
    PromptTuning,
    Refusal,
    SFTData,
    load,
)
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.scoring import scores
from tests.contract.subjects import trainer
from tests.modules.preference import weights
from tests.modules.rollouts import Stir, answers, fit, grpo, on_ranks, play, sevens, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("grpo"))


# -- what a round is ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Two rounds of two steps and two passes each, with a KL penalty."""
    folder = tmp_path_factory.mktemp("whole")
    module, watch, made = play(job, folder, LoRA(r=4), Stir(), data={"passes": 2, "batch_size": 8}, beta=0.1, lr=0.1)
    return module, watch, made, folder


def test_the_first_update_of_every_round_has_ratio_one(whole):
    _, watch, _, _ = whole
    assert len(watch.rounds) == 2 and len(watch.logged) == 8
    for step in (0, 4):
        logged = watch.logged[step]
        assert logged["train/ratio"] == 1.0, "the very numbers that were measured"
        assert logged["train/policy_kl"] == logged["train/clipped_low"] == logged["train/clipped_high"] == 0.0
    assert any(logged["train/ratio"] != 1.0 for logged in watch.logged[1:4])


def test_answers_are_drawn_from_the_weights_at_the_beginning_of_their_round(job, tmp_path):
    """By the formula: log-probabilities of the model that a round began with are those that were measured."""
    seen = []

    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 2 == 0:  # nothing is updated between the drawing and this hook
                with torch.no_grad():
                    now = scores(pl_module.view, batch, temperature=0.8)["logprob"]
                seen.append((batch_idx, now, batch.columns["old_logps"]))

    play(job, tmp_path, LoRA(r=4), Check(), data={"batch_size": 8}, temperature=0.8)
    assert len(seen) == 2
    for _, now, old in seen:
        torch.testing.assert_close(now, old, rtol=0, atol=1e-6)


def test_a_prompt_is_read_once_for_its_group(whole):
    _, watch, _, _ = whole
    for batch in watch.batches:
        owners = [entry for entry in batch.shared if entry is None]
        assert len(owners) == 2 and len(batch.shared) == 8


def test_advantages_are_those_of_groups(whole):
    _, watch, _, _ = whole
    for round in watch.rounds:
        for group in range(4):
            own = [float(r) for r in round.rewards[group]]
            mean = sum(own) / 4
            deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / 3)
            for sample in range(4):
                answer = 4 * group + sample
                found = round.tokens["advantages"][round.owner == answer]
                if bool(round.kept[answer]):
                    assert len(found) == len(round.answers[answer].ids)
                    expected = (own[sample] - mean) / (deviation + 1e-4)
                    assert found.tolist() == pytest.approx([expected] * len(found), rel=1e-5)
                else:
                    assert len(found) == 0 and deviation == 0


def test_some_answers_are_written_down(whole):
    _, watch, _, folder = whole
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0] * 4 + [1] * 4
    assert [line["answer"] for line in lines[:4]] == watch.rounds[0].texts[:4]
    assert [line["reward"] for line in lines[:4]] == pytest.approx(watch.rounds[0].scores.total[:4].tolist())


def test_facts_are_logged_once_a_round(whole):
    _, watch, made, _ = whole
    logged, last = made.callback_metrics, watch.rounds[-1]
    assert float(logged["train/reward"]) == pytest.approx(float(last.scores.total.mean()), rel=1e-6)
    assert float(logged["train/rewards/sevens"]) == pytest.approx(float(last.scores.each["sevens"].mean()), rel=1e-6)
    assert float(logged["train/length"]) == pytest.approx(float(np.mean([len(a.ids) for a in last.answers])), rel=1e-6)
    difference = last.tokens["old_logps"].double() - last.tokens["reference_logps"].double()
    assert float(logged["train/kl"]) == pytest.approx(float(difference.sum()) / int(last.kept.sum()), rel=1e-5)
    assert float(logged["train/kl_k3"]) == pytest.approx(float(((-difference).exp() - 1 + difference).mean()), rel=1e-5)


# -- the same step, however it is computed -------------------------------------------------------------------------------------

LAYOUTS = {
    "padded": ({"packing": False}, {}, {}),
    "separate prompts": ({"share_prompts": False}, {}, {}),
    "accumulated": ({"batch_size": 2}, {}, {"accumulate_grad_batches": 4}),
    "checkpointed": ({}, {"gradient_checkpointing": True}, {}),
    "sdpa": ({}, {"attention": "sdpa"}, {}),
    "drawn one by one": ({"draw_batch": 1}, {}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_steps(job, tmp_path, whole, layout):
    data, model, options = LAYOUTS[layout]
    given = {"passes": 2, "batch_size": 8, **data}
    _, watch, _ = play(
        job, tmp_path, LoRA(r=4), Stir(), data=given, options=options, **{"beta": 0.1, "lr": 0.1, **model}
    )
    truth = whole[1]
    assert [answers(round) for round in watch.rounds] == [answers(round) for round in truth.rounds]
    assert len(watch.gradients) == len(truth.gradients) == 8
    for step, expected in enumerate(truth.gradients):
        for name, gradient in expected.items():
            torch.testing.assert_close(
                watch.gradients[step][name], gradient, rtol=1e-4, atol=1e-5, msg=f"{step} {name}"
            )
    assert float(truth.gradients[-1][name].abs().max()) > 1e-5


@pytest.mark.parametrize(("strategy", "full"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_ranks(job, tmp_path, two_ranks, strategy, full):
    """Five prompts: one rank writes three of them and the other two."""
    asked = {"job": str(job), "full": full, "beta": 0.1, "lr": 0.05}
    one = on_ranks(folder=str(tmp_path / "one"), devices=1, strategy="auto", **asked)
    found = two_ranks.run(
        "tests.modules.rollouts:on_ranks", folder=str(tmp_path / "two"), devices=2, strategy=strategy, **asked
    )
    for rank in found:
        assert rank["answers"] == one["answers"]
        assert rank["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_number_of_forwards_is_that_of_new_tokens(job, tmp_path):
    """Time linear in new tokens: a prompt is read once for its group, then each token is read once and alone."""
    read = []

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            def note(module, args, kwargs):
                if kwargs.get("past_key_values") is not None:
                    read.append(tuple(kwargs["input_ids"].shape))

            pl_module.view.backbone.register_forward_pre_hook(note, with_kwargs=True)

    _, watch, _ = play(job, tmp_path, LoRA(r=4), Count(), options={"max_epochs": 1}, max_new_tokens=40)
    longest = max(len(answer.ids) for answer in watch.rounds[0].answers)
    assert len(read) == longest, "one pass over the prompts, and one for each token but the last"
    assert read[0][0] == 4 and all(shape[1] == 1 for shape in read[1:])


PARTS = {
    "lora": lambda: LoRA(r=4),
    "adapter": lambda: BottleneckAdapter(reduction_factor=4),
    "ia3": IA3,
    "prefix": lambda: PrefixTuning(tokens=3),
    "prompt": lambda: PromptTuning(tokens=3),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
def test_what_is_trained_is_what_wrote(job, tmp_path, part, packing):
    """Near temperature 0 every token has probability 1, but only if writing with a cache and learning compute the same."""
    given = {"batch_size": 8, "packing": packing}
    settings = {"temperature": 1e-3, "drop_without_signal": False, "max_new_tokens": 10, "lr": 1e-6}
    _, watch, _ = play(job, tmp_path, PARTS[part](), Stir(), data=given, options={"max_epochs": 1}, **settings)
    (round,) = watch.rounds
    assert len({tuple(answer.ids) for answer in round.answers}) > 1, "prompts are answered differently"
    # Two tokens may be all but alike at this temperature; where the two ways differ it is hundreds of nats.
    assert float(round.tokens["old_logps"].min()) > -10, "a token was drawn that learning thinks impossible"


# -- resumed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("done", "again"), [(2, [1]), (4, [1]), (6, []), (8, [])])
def test_a_resumed_run_goes_on_with_its_round(job, tmp_path, done, again):
    """Saved within and after rounds: the same weights, bit for bit, and only rounds that had not begun are written anew."""
    written = []

    def noting(completions, **columns):
        written.append(list(completions))
        return sevens(completions)

    shape = {"data": {"passes": 2, "batch_size": 8}, "rewards": {"noting": noting}, "optimizer": None, "lr": 0.01}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    kept = {"enable_checkpointing": True}
    module, rows = grpo(job, tmp_path / "whole", **shape)
    fit(tmp_path / "whole", module, rows, LoRA(r=4), save, **kept)
    first, written[:] = list(written), []
    assert len(first) == 2
    resumed, rows = grpo(job, tmp_path / "resumed", **shape)
    made = trainer(
        tmp_path / "resumed", LoRA(r=4), max_steps=-1, max_epochs=2, limit_val_batches=0, log_every_n_steps=1
    )
    made.fit(resumed, rows, ckpt_path=tmp_path / f"step={done}.ckpt")
    assert written == [first[number] for number in again]
    assert made.global_step == 8
    for name, value in weights(module).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_two_ranks_go_on_with_their_round(job, tmp_path, two_ranks):
    """From the middle of the first round; a checkpoint has the round of both ranks."""
    found = two_ranks.run("tests.modules.rollouts:resumed_on_ranks", job=str(job), folder=str(tmp_path), step=1)
    for whole, resumed, drawn in found:
        assert drawn == [1]
        for name, value in whole.items():
            assert torch.equal(resumed[name], value), name


def test_the_checkpoint_holds_plain_types_and_loads(job, tmp_path):
    module, _, made = play(job, tmp_path, LoRA(r=4), options={"max_epochs": 1}, rewards={"short": {"length": 3}})
    made.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["PromptData"]["round"]["number"] == 0
    again = load(tmp_path / "last.ckpt")
    assert isinstance(again, GRPO) and again.generate(["tell 1"], max_new_tokens=4) == module.generate(
        ["tell 1"], max_new_tokens=4
    )


# -- what is trained, and what not ---------------------------------------------------------------------------------------------


def digest(module):
    """Of every frozen byte."""
    found = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            found.update(name.encode())
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_base_keeps_its_bytes(job, tmp_path, quantize):
    """LoRA is never merged in place, neither for writing nor for the reference."""
    seen = []

    class Hash(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(digest(pl_module))

    module, watch, _ = play(job, tmp_path, LoRA(r=4), Hash(), beta=0.1, quantize=quantize, data={"batch_size": 8})
    assert digest(module) == seen[0]
    assert any(bool(p.any()) for n, p in module.named_parameters() if n.endswith("lora_B"))
    assert watch.logged[0]["train/ratio"] == watch.logged[2]["train/ratio"] == 1.0
    assert watch.logged[0]["train/kl_loss"] == 0.0 < watch.logged[2]["train/kl_loss"], "the reference is the start"


def test_full_training_and_a_part(job, tmp_path):
    for number, parts in enumerate(([], [Freeze(["norms"])])):
        before, watch, _ = play(job, tmp_path / str(number), *parts, beta=0.05, lr=0.05)
        assert len(watch.rounds) == 2 and all(math.isfinite(loss) for loss in watch.losses)
        assert watch.logged[0]["train/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_validation_asks_for_the_most_likely_answers(job, tmp_path):
    module, rows = grpo(job, tmp_path, data={"val_path": str(job / "prompts.jsonl"), "draw_batch": 5})
    made = fit(tmp_path, module, rows, LoRA(r=4), max_epochs=1, limit_val_batches=1.0)
    prompts = [json.loads(line)["prompt"] for line in (job / "prompts.jsonl").read_text().splitlines()]
    texts = module.generate(prompts, max_new_tokens=6)
    assert float(made.callback_metrics["val/reward"]) == pytest.approx(sum(sevens(texts)) / len(texts), rel=1e-5)
    predicted = trainer(tmp_path, LoRA(r=4), max_steps=-1)
    rows.predict_path = str(job / "prompts.jsonl")
    module2, rows2 = grpo(job, tmp_path, data={"predict_path": str(job / "prompts.jsonl")})
    found = [one for batch in predicted.predict(module2, rows2) for one in batch]
    assert [one["row"] for one in found] == list(range(12)) and found[3]["prompt"] == prompts[3]


# -- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"samples": 0, "advantage": "reinforce++"}, "GRPO.samples must be at least 1"),
        ({"samples": 1}, "GRPO.samples must be at least 2, got 1: the advantage group compares"),
        ({"advantage": "reinforce++", "scale": "none"}, "GRPO.scale is none, but the advantage reinforce"),
        ({"advantage": "reinforce++", "correct_kl": False}, "GRPO.correct_kl is False, but the KL of reinforce"),
        ({"temperature": 0.0}, "GRPO.temperature must be greater than 0"),
        ({"loss": "ppo"}, "GRPO.loss must be one of"),
        ({"advantage": "rloo", "scale": "none"}, "divides by nothing"),
        ({"clip_high": 0.5, "clip_both": 1.4}, "greater than 1 \\+ clip_high"),
        (
            {"loss": "cispo", "clip_both": 2.0},
            "clip_both is 2.0, but cispo is bounded by cispo_most; leave it out",
        ),
        ({"loss": "cispo", "clip_low": 0.1}, "GRPO.clip_low is 0.1, but cispo"),
        ({"loss": "cispo", "clip_high": 0.28}, "GRPO.clip_high is 0.28, but cispo"),
        ({"cispo_most": 2.0}, "cispo_most is 2.0, but dapo is bounded by clip_low, .*; leave it out"),
        ({"stop_strings": [""]}, "empty text"),
        ({"rewards": {}}, "at least one reward"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(Refusal, match=said):
        GRPO("starter:smollm2-135m", **{"rewards": {"short": {"length": 3}}, **arguments})


def test_what_cannot_work_is_refused_before_anything_is_loaded(job, tmp_path):
    module, rows = grpo(job, tmp_path)
    with pytest.raises(Refusal, match="noise in training makes the policy another one"):
        fit(tmp_path, module, rows, LoRA(r=4), NEFTune(5.0))
    module, rows = grpo(job, tmp_path)
    with pytest.raises(Refusal, match=r"LoRA.dropout is 0.1.*leave it out\.$"):
        fit(tmp_path, module, rows, LoRA(r=4, dropout=0.1))
    module, rows = grpo(job, tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "some"}\n')
    with pytest.raises(Refusal, match="give it prompts, by PromptData"):
        trainer(tmp_path, LoRA(r=4)).fit(module, SFTData(str(tmp_path / "texts.jsonl"), cache_dir=str(tmp_path)))
    assert module.model is None
    with pytest.raises(Refusal, match="SFT writes none that it learns from"):
        trainer(tmp_path, LoRA(r=4)).fit(SFT(str(job / "model")), rows)

    def needs(completions, solution, **columns):
        return [0.0] * len(completions)

    module, rows = grpo(job, tmp_path, rewards={"needs": needs})
    with pytest.raises(Refusal, match="wants solution, which is no column of the data"):
        fit(tmp_path, module, rows, LoRA(r=4))
    assert module.model is None


def test_a_run_that_would_be_dealt_otherwise_is_refused(job, tmp_path):
    module, rows = grpo(job, tmp_path, data={"batch_size": 8})
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, module, rows, LoRA(r=4), save, max_epochs=1, enable_checkpointing=True)
    module, rows = grpo(job, tmp_path, data={"batch_size": 8, "passes": 2})
    made = trainer(tmp_path, LoRA(r=4), max_steps=-1, max_epochs=2, limit_val_batches=0)
    with pytest.raises(Refusal, match="in the middle of an epoch with passes 1"):
        made.fit(module, rows, ckpt_path=tmp_path / "step=1.ckpt")
    assert Attachment.of(module).installed is False


@pytest.mark.parametrize("share", [None, False], ids=["one prompt for a group", "each its own"])
def test_what_matters_to_the_task_is_measured_on_the_answers_of_the_last_round(job, tmp_path, share):
    """MAS: of each answer |d ||logits||^2 / d theta|, here one answer at a time by the definition."""
    mas = MAS(lam=0.0)
    module, data = grpo(job, tmp_path, data={"prompts": 2, "share_prompts": share}, samples=2)
    fit(tmp_path, module, data, Freeze(["norms"]), mas, max_epochs=1)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    wanted = {name: torch.zeros(()) for name in names}
    for number, answer in enumerate(data.round.answers):
        prompt = data.round.prompts[number // 2].ids
        logits = module.model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        module.zero_grad()
        logits.square().sum().backward()
        for name in names:
            wanted[name] = wanted[name] + module.get_parameter(name).grad.abs() / len(data.round.answers)
    measured = mas.state_dict()["next"]["importance"]
    assert measured.keys() == wanted.keys() and all(value.sum() > 0 for value in wanted.values())
    for name in names:
        torch.testing.assert_close(measured[name], wanted[name], rtol=1e-4, atol=1e-4)
