"""On-policy distillation: who writes a round, the formula on what was written, layouts, ranks, resume, and what is refused."""

import json
import math
import shutil

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from lightning_ft import LoRA, OnPolicyDistillation, PrefixTuning, PromptData, Refusal
from lightning_ft.data.given_answers import given_answers
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.rollouts.round import Prompt
from lightning_ft.engine.sampling import sample
from lightning_ft.models.causal import CausalLM
from tests.modules.gkd import gkd, on_ranks, play, write_job
from tests.modules.preference import weights
from tests.modules.rollouts import Stir, answers, fit

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("gkd"))


# -- the loss ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(job, round, divergence, beta, temperature):
    """The mean over the answers' tokens in float64, each row alone through transformers' own forward, all logits at once."""
    student = hf.AutoModelForCausalLM.from_pretrained(job / "model").double().eval()
    teacher = hf.AutoModelForCausalLM.from_pretrained(job / "teacher").double().eval()
    size, found = student.config.vocab_size, []
    for number, answer in enumerate(round.answers):
        if not round.kept[number]:
            continue
        prompt = round.prompts[number // round.samples].ids
        ids = torch.tensor([[*prompt, *answer.ids]])
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(answer.ids))
        p, q = (torch.softmax(m(ids).logits[0, at, :size] / temperature, -1) for m in (student, teacher))
        if divergence == "forward_kl":
            value = (q * (q / p).log()).sum(-1)
        elif divergence == "reverse_kl":  # MiniLLM, of one token
            value = (p * (p / q).log()).sum(-1)
        else:
            m = beta * q + (1 - beta) * p
            value = (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1) / (beta * (1 - beta))
        found.append(value * temperature**2)
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(
    ("divergence", "share", "sequence_kd"),
    [
        ("forward_kl", 0.0, False),
        ("reverse_kl", 1.0, False),
        ("jensen_shannon", 1.0, False),
        ("jensen_shannon", 0.0, True),
    ],
)
def test_the_first_step_costs_what_the_formula_says(job, tmp_path, divergence, share, sequence_kd):
    model = {"share": share, "sequence_kd": sequence_kd, "divergence": divergence, "beta": 0.3, "loss_temperature": 1.7}
    _, watch, run = play(job, tmp_path, options={"max_epochs": 1}, lr=1e-12, **model)
    assert float(run.callback_metrics["train/t2"]) == pytest.approx(1.7**2)
    expected = by_hand(job, watch.rounds[0], divergence, 0.3, 1.7)
    assert watch.losses[0] == pytest.approx(expected, rel=1e-4) and expected > 0.1


@pytest.mark.parametrize(("parts", "dtype"), [([], "float32"), ([LoRA(r=4)], "bfloat16")], ids=["all of it", "LoRA"])
def test_the_student_itself_is_no_teacher(job, tmp_path, parts, dtype):
    """Also under another name and in another dtype; an adapter that has learned makes it another student."""
    shutil.copytree(job / "model", tmp_path / "copy")
    given = {"teacher": str(tmp_path / "copy"), "teacher_dtype": dtype, "share": 1.0, "options": {"max_epochs": 1}}
    with pytest.raises(Refusal, match="has the weights of the student"):
        play(job, tmp_path, *parts, **given)
    if parts:
        run = play(job, tmp_path, LoRA(r=4), share=1.0)[2]
        run.save_checkpoint(tmp_path / "learned.ckpt")
        _, watch, _ = play(job, tmp_path, LoRA(init_from=str(tmp_path / "learned.ckpt")), **given)
        assert watch.losses[0] > 1e-4


def test_training_brings_the_student_to_the_teacher_on_its_own_answers(job, tmp_path):
    made = {"optimizer": torch.optim.AdamW, "lr": 3e-3, "share": 1.0}
    rows = {"val_path": str(job / "prompts.jsonl")}
    ends = []
    for rounds in (1, 25):
        options = {"max_epochs": rounds, "limit_val_batches": None, "check_val_every_n_epoch": rounds}
        _, _, run = play(job, tmp_path, data=rows, options=options, **made)
        ends.append(float(run.callback_metrics["val/loss"]))
    assert ends[1] < 0.8 * ends[0]


# -- who writes --------------------------------------------------------------------------------------------------------------


def test_the_writer_is_drawn_with_the_share_and_by_the_seed_alone(job, tmp_path):
    def writers(seed, **model):
        module, _ = gkd(job, tmp_path, **model)
        Attachment.of(module).seed = seed
        return [module.writer(number) for number in range(2000)]

    one = writers(1, share=0.3)
    assert one == writers(1, share=0.3) != writers(2, share=0.3)
    assert one.count("student") == pytest.approx(600, abs=4 * math.sqrt(2000 * 0.21)) and set(one) == {
        "student",
        "data",
    }
    assert set(writers(1, share=1.0)) == {"student"} and set(writers(1, share=0.0)) == {"data"}
    assert set(writers(1, share=0.0, sequence_kd=True)) == {"teacher"}
    more = writers(1, share=0.6)
    assert all(b == "student" for a, b in zip(one, more, strict=True) if a == "student"), (
        "a larger share keeps the smaller"
    )


def test_answers_of_the_data_end_as_their_rows_do_and_count_once(job, tmp_path):
    module, watch, run = play(job, tmp_path, share=0.0, samples=3, data={"batch_size": 18}, options={"max_epochs": 2})
    lines = [json.loads(line) for line in (job / "prompts.jsonl").read_text().splitlines()]
    end = module.tokenizer.eos_token_id
    for round in watch.rounds:
        assert round.kept.tolist() == [True, False, False] * 6
        for number, prompt in enumerate(round.prompts):
            expected = [*module.tokenizer(lines[prompt.row]["completion"])["input_ids"], end]
            assert round.answers[3 * number].ids == expected
    assert all(batch.counts["row"] == 6 for batch in watch.batches)
    assert float(run.callback_metrics["train/on_policy"]) == 0.0
    assert float(run.callback_metrics["train/trained_share"]) == pytest.approx(1 / 3)


def test_the_teacher_writes_as_it_would_alone(job, tmp_path):
    module, watch, _ = play(job, tmp_path, share=0.0, sequence_kd=True, options={"max_epochs": 1})
    round = watch.rounds[0]
    teacher = hf.AutoModelForCausalLM.from_pretrained(job / "teacher").eval()
    found = sample(
        CausalLM(teacher),
        [prompt.ids for prompt in round.prompts],
        seeds=module._seeds([prompt.row for prompt in round.prompts], 0, 1),
        max_new_tokens=5,
        temperature=0.9,
        size=259,
        end_ids=[module.tokenizer.eos_token_id],
    )
    assert [one[0].ids for one in found] == [answer.ids for answer in round.answers]
    own = play(job, tmp_path, share=1.0, options={"max_epochs": 1})[1].rounds[0]
    assert answers(own) != answers(round)


def test_what_the_other_cannot_read_is_never_written(job, tmp_path):
    """The teacher's output layer is padded; with all its weight on the padding it would write nothing else."""
    teacher = hf.AutoModelForCausalLM.from_pretrained(job / "teacher")
    with torch.no_grad():
        teacher.get_output_embeddings().weight[259:] *= 100
    teacher.save_pretrained(tmp_path / "padded")
    hf.AutoTokenizer.from_pretrained(job / "model").save_pretrained(tmp_path / "padded")
    _, watch, _ = play(job, tmp_path, teacher=str(tmp_path / "padded"), share=0.0, sequence_kd=True)
    assert max(max(answer.ids) for round in watch.rounds for answer in round.answers) < 259


def test_chats_are_answered_as_their_template_says(job):
    tokenizer = hf.AutoTokenizer.from_pretrained(job / "model")
    asked = [{"role": "user", "content": "Good?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    for told in ("no", [{"role": "assistant", "content": "no"}]):
        (found,) = given_answers(tokenizer, [Prompt(0, asked, ids, {"said": told})], "said")
        assert tokenizer.decode(found) == "no<|im_end|>"
        (cut,) = given_answers(tokenizer, [Prompt(0, asked, ids[-7:], {"said": told})], "said")
        assert cut == found
    two = [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant")]
    for columns, why in (({}, "has no answer in said"), ({"said": two}, "several turns")):
        with pytest.raises(Refusal, match=f"Row 4 of the prompts.*{why}"):
            given_answers(tokenizer, [Prompt(3, asked, ids, columns)], "said")
    with pytest.raises(Refusal, match="does not begin with the tokens of the prompt alone"):
        given_answers(tokenizer, [Prompt(3, asked, [*ids[:-1], 9], {"said": "no"})], "said")
    with pytest.raises(Refusal, match="prompt is a string and said is not"):
        given_answers(tokenizer, [Prompt(3, "Good?", ids, {"said": two})], "said")


# -- the same step, however it is computed -----------------------------------------------------------------------------------

LAYOUTS = {
    "padded": ({"packing": False}, {}, {}),
    "separate prompts": ({"share_prompts": False}, {}, {}),
    "accumulated": ({"batch_size": 3}, {}, {"accumulate_grad_batches": 4}),
    "small chunks": ({}, {"chunk_size": 3}, {}),
    "checkpointed": ({}, {"gradient_checkpointing": True}, {}),
}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Two rounds of two answers to each prompt, with LoRA, at a moved beginning."""
    return play(job, tmp_path_factory.mktemp("whole"), LoRA(r=4), Stir(), samples=2, share=1.0, data={"batch_size": 12})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_steps(job, tmp_path, whole, layout):
    data, model, options = LAYOUTS[layout]
    given = {"batch_size": 12, **data}
    _, watch, _ = play(job, tmp_path, LoRA(r=4), Stir(), data=given, options=options, samples=2, share=1.0, **model)
    truth = whole[1]
    assert [answers(round) for round in watch.rounds] == [answers(round) for round in truth.rounds]
    assert len(watch.gradients) == len(truth.gradients) == 2
    for step, expected in enumerate(truth.gradients):
        for name, gradient in expected.items():
            torch.testing.assert_close(watch.gradients[step][name], gradient, rtol=1e-4, atol=1e-5)
    assert float(truth.gradients[-1][name].abs().max()) > 1e-5


def test_a_prompt_is_read_once_for_its_answers(whole):
    assert all(sum(entry is None for entry in batch.shared) == 6 for batch in whole[1].batches)


@pytest.mark.parametrize(("strategy", "full"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_ranks(job, tmp_path, two_ranks, strategy, full):
    """Five prompts on two ranks, rounds of both kinds: the choice, the answers, the measures and the weights of one rank."""
    asked = {"job": str(job), "full": full, "share": 0.5, "sequence_kd": strategy == "fsdp2"}
    one = on_ranks(folder=str(tmp_path / "one"), devices=1, strategy="auto", **asked)
    found = two_ranks.run(
        "tests.modules.gkd:on_ranks", folder=str(tmp_path / "two"), devices=2, strategy=strategy, **asked
    )
    assert len(set(one["writers"])) == 2 and one["divided"] == [set()] * 2
    for rank in found:
        assert rank["blocks"] and rank["divided"] == [rank["blocks"] if strategy == "fsdp2" else set()] * 2
        assert rank["writers"] == one["writers"] and rank["answers"] == one["answers"]
        assert rank["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


# -- what trains, and what is kept -------------------------------------------------------------------------------------------


def test_the_teacher_is_in_nothing_that_is_the_modules(job, tmp_path):
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            model = pl_module._teacher.observer.view.model
            seen["model"], seen["bytes"] = model, {n: p.clone() for n, p in model.state_dict().items()}
            held = {id(p) for p in model.parameters()}
            assert not held & {id(p) for p in pl_module.parameters()}
            assert not model.training and not any(p.requires_grad for p in model.parameters())

    module, _, run = play(job, tmp_path, LoRA(r=4), Look())
    assert all(torch.equal(value, seen["bytes"][name]) for name, value in seen["model"].state_dict().items())
    run.save_checkpoint(tmp_path / "end.ckpt")
    keys = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert keys and all("lora_" in name for name in keys)
    assert module._teacher is None, "it is let go when the run ends"
    loaded = lightning_ft.load(tmp_path / "end.ckpt")
    for name, value in weights(module).items():
        assert torch.equal(weights(loaded)[name], value)


def test_resumed_is_unbroken_and_another_teacher_is_refused(job, tmp_path):
    def run(folder, *callbacks, ckpt_path=None, **model):
        module, rows = gkd(job, folder, data={"batch_size": 3}, **{"optimizer": None, "lr": 0.01, **model})
        fit(folder, module, rows, LoRA(r=4), *callbacks, ckpt_path=ckpt_path, max_epochs=4, enable_checkpointing=True)
        return weights(module)

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(tmp_path / "whole", save)
    for step in (3, 4):  # within a round, and between two
        resumed = run(tmp_path / f"resumed-{step}", ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), step
    other = hf.AutoModelForCausalLM.from_pretrained(job / "teacher")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "changed")
    hf.AutoTokenizer.from_pretrained(job / "model").save_pretrained(tmp_path / "changed")
    with pytest.raises(Refusal, match="The run was begun with another teacher"):
        run(tmp_path / "other", ckpt_path=str(tmp_path / "step=3.ckpt"), teacher=str(tmp_path / "changed"))
    run(tmp_path / "bf16", ckpt_path=str(tmp_path / "step=3.ckpt"), teacher_dtype="bfloat16")  # as another device may


def test_a_prefix_learns_on_its_own_answers(job, tmp_path):
    _, watch, _ = play(job, tmp_path, PrefixTuning(tokens=3), share=1.0)
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert all(float(g.abs().max()) > 0 for g in watch.gradients[-1].values())


def test_rewards_are_looked_at_and_not_learned_from(job, tmp_path):
    given = {"share": 1.0, "options": {"limit_val_batches": None}, "data": {"val_path": str(job / "prompts.jsonl")}}
    one, _, _ = play(job, tmp_path, LoRA(r=4), **given)
    two, watch, run = play(job, tmp_path, LoRA(r=4), rewards={"short": {"length": 3}}, **given)
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())
    assert float(run.callback_metrics["train/rewards/short"]) == pytest.approx(
        float(watch.rounds[-1].scores.each["short"].mean()), rel=1e-6
    )
    assert "val/reward" in run.callback_metrics


def test_validation_alone_asks_the_teacher_and_prediction_does_not(job, tmp_path):
    rows = {"val_path": str(job / "prompts.jsonl"), "predict_path": str(job / "prompts.jsonl")}
    module, data = gkd(job, tmp_path, data=rows)
    from tests.contract.subjects import trainer

    (found,) = trainer(tmp_path, limit_val_batches=None).validate(module, data)
    assert found["val/loss"] > 0.1
    module, data = gkd(job, tmp_path, data=rows, teacher=str(tmp_path / "gone away"))
    assert len(trainer(tmp_path).predict(module, data)) > 0


def test_what_cannot_be_is_refused(job, tmp_path, monkeypatch):
    def run(**model):
        data = model.pop("data", None)
        play(job, tmp_path, data=data, options={"max_epochs": 1}, **model)

    with pytest.raises(Refusal, match="teacher is self, and a model has nothing to learn from itself"):
        gkd(job, tmp_path, teacher="self")
    with pytest.raises(Refusal, match="have no column answer"):
        run(answer_column="answer")
    with pytest.raises(Refusal, match="^OnPolicyDistillation.teacher: There is no folder"):
        run(teacher=str(tmp_path / "nowhere" / "a b"))
    with pytest.raises(Refusal, match="share must be"):
        gkd(job, tmp_path, share=1.5)
    other = hf.AutoTokenizer.from_pretrained(job / "model")
    other.add_tokens(["<new>"])
    hf.AutoModelForCausalLM.from_pretrained(job / "teacher").save_pretrained(tmp_path / "foreign")
    other.save_pretrained(tmp_path / "foreign")
    with monkeypatch.context() as patch, pytest.raises(Refusal, match="different vocabularies"):
        patch.setattr("lightning_ft.engine.module.load_for_task", lambda *a, **k: pytest.fail("the student is loaded"))
        run(teacher=str(tmp_path / "foreign"))
    lines = [{"prompt": f"tell {n}", "completion": ""} for n in range(8)]
    (tmp_path / "empty.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    module, _ = gkd(job, tmp_path, share=0.0)
    with pytest.raises(Refusal, match="has no answer in completion"):
        fit(tmp_path, module, PromptData(str(tmp_path / "empty.jsonl"), prompts=4, cache_dir=str(tmp_path / "c")))
    assert OnPolicyDistillation("x", teacher="y").share == 0.5
