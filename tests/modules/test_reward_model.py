"""RewardModel: what it reads, what it learns, how it is normalised, with every trainable part and on two ranks."""

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional as F

import lightning_ft
from lightning_ft import (
    IA3,
    BottleneckAdapter,
    Freeze,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Refusal,
    RewardModel,
    SFTData,
)
from lightning_ft.engine.attachment import Attachment
from tests.contract.subjects import Steps, trainer
from tests.modules.rewards import KINDS, ROWS, fit, job, on_ranks, pairs, weights, write_base, write_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
LAYOUTS = {
    "shared": {"packing": True, "share_prompts": True},
    "separate": {"packing": True, "share_prompts": False},
    "padded": {"packing": False},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def predicted(made, module, data):
    """(ROWS, 2) rewards of chosen and rejected in the order of the file."""
    data.predict_path = data.path
    found = {}
    for batch in made.predict(module, data):
        for row, both in zip(batch["rows"][::2].tolist(), batch["reward"].reshape(-1, 2), strict=True):
            found[row] = both
    return torch.stack([found[row] for row in range(ROWS)])


@torch.no_grad()
def alone(module, data):
    """The same by the model's own forward, one whole row at a time: without padding its last token is the last."""
    found = []
    rows = data._get("train")
    for segment in rows.segments(range(len(rows))):
        prompt = segment.ids[: segment.prompt]
        for answer in (segment.chosen, segment.rejected):
            row = torch.from_numpy(np.concatenate([prompt, answer.ids]).astype(np.int64))[None]
            module.model.config.pad_token_id = None
            found.append(module.model.eval()(input_ids=row).logits.item())
    return torch.tensor(found).reshape(-1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_read_at_its_last_token_in_every_layout(bases, tmp_path, kind):
    truth = None
    for layout in LAYOUTS.values():
        module, data = job(bases[kind], tmp_path, data={"batch_size": 5, **layout})
        made = trainer(tmp_path)
        if kind == "bert" and layout.get("share_prompts"):
            with pytest.raises(Refusal, match="an encoder, in which the prompt sees the answer"):
                predicted(made, module, data)
            continue
        rewards = predicted(made, module, data)
        if truth is None:
            truth = alone(module, data)
        torch.testing.assert_close(rewards, truth, **CLOSE)
        assert data.shares_prompts == bool(layout.get("share_prompts"))
    assert truth.std() > 0.01 and (truth[:, 0] - truth[:, 1]).abs().min() > 1e-4  # a mistaken token would show


def test_unless_told_otherwise_prompts_are_shared(bases, tmp_path):
    module, data = job(bases["llama"], tmp_path)
    fit(tmp_path, module, data)
    assert module.sharing_reason == "" and data.shares_prompts


STEPS = {
    "shared": ({"data": LAYOUTS["shared"]}, {}),
    "separate": ({"data": LAYOUTS["separate"]}, {}),
    "accumulated": ({"data": {"batch_size": 2}}, {"accumulate_grad_batches": 3}),
    "checkpointed": ({"gradient_checkpointing": True}, {}),
}


def test_steps_are_the_formulas_whatever_the_layout(bases, tmp_path):
    """Two steps of SGD by hand, on padded rows, in the loss with margins and centring."""
    module, data = job(bases["llama"], tmp_path, data=LAYOUTS["padded"], center_rewards_coefficient=0.1)
    steps = Steps()
    made = fit(tmp_path, module, data, steps, log_every_n_steps=1)
    after, logged = weights(module), {k: float(v) for k, v in made.callback_metrics.items()}
    again, _ = job(bases["llama"], tmp_path)
    Attachment.of(again).rebuild([], seed=0)
    again.train()
    margins = torch.tensor([row["margin"] for row in pairs(margins=True)])
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    assert sorted(row for batch in steps.batches for row in batch.rows[::2].tolist()) == list(range(ROWS))
    for batch in steps.batches:
        rewards = again.view.row_logits(batch.ids, batch.positions, mask=batch.mask)[:, 0]
        w, lose, m = rewards[0::2], rewards[1::2], margins[batch.rows[::2]]
        loss = -F.logsigmoid(w - lose - m).mean() + 0.1 * (w + lose).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss, w, lose = loss.detach(), w.detach(), lose.detach()
    assert logged["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert logged["train/accuracy"] == pytest.approx(float((w > lose).float().mean()))
    assert logged["train/rewards/margins"] == pytest.approx(float((w - lose).mean()), rel=1e-4, abs=1e-6)
    for name, value in weights(again).items():
        torch.testing.assert_close(after[name], value, **CLOSE)
    for given, options in STEPS.values():
        other, rows = job(bases["llama"], tmp_path, **{"center_rewards_coefficient": 0.1, **given})
        fit(tmp_path, other, rows, **options)
        for name, value in weights(other).items():
            torch.testing.assert_close(value, after[name], **CLOSE)


def test_what_a_validation_measures(bases, tmp_path):
    module, data = job(bases["bert"], tmp_path, data={"val_batch_size": 5}, calibration_bins=4)
    made = fit(tmp_path, module, data)
    (found,) = made.validate(module, data, verbose=False)
    rewards = predicted(made, module, data).double()
    margins = torch.tensor([row["margin"] for row in pairs(margins=True)])
    w, lose = rewards.T
    assert found["val/loss"] == pytest.approx(float(-F.logsigmoid(w - lose - margins).mean()), rel=1e-5)
    assert found["val/accuracy"] == pytest.approx(float((w > lose).double().mean()))
    assert found["val/rewards/chosen"] == pytest.approx(float(w.mean()), rel=1e-4, abs=1e-6)
    assert found["val/rewards/rejected"] == pytest.approx(float(lose.mean()), rel=1e-4, abs=1e-6)
    assert 0 <= found["val/calibration"] <= 0.5


def test_pairs_are_learnt_by_heart(bases, tmp_path):
    options = {"optimizer": None, "lr": 3e-3, "head_lr": 1e-2, "dropout": True}
    write_pairs(tmp_path / "pairs.jsonl", pairs())
    module, data = job(bases["bert"], tmp_path, **options)
    made = fit(tmp_path, module, data, max_steps=40, max_epochs=40, check_val_every_n_epoch=20)
    assert float(made.callback_metrics["val/accuracy"]) == 1 and float(made.callback_metrics["val/loss"]) < 0.1


# -- the head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_is_small_and_follows_from_the_seed(bases, kind):
    heads = []
    for seed in (0, 0, 1):
        module = RewardModel(str(bases[kind]))
        Attachment.of(module).rebuild([], seed=seed)
        heads.append(module.view.output_layer()[1])
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.shape == (1, 32) and heads[0].weight.requires_grad
    assert float(torch.cat([h.weight.detach() for h in heads[1:]]).std() * 33**0.5) == pytest.approx(1, abs=0.3)
    assert heads[0].bias is None or not heads[0].bias.any()
    assert (heads[0].bias is None) == (kind != "bert")


def test_a_head_of_one_output_is_kept(bases, tmp_path):
    brought = hf.AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    brought.save_pretrained(tmp_path / "brought")
    hf.AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(tmp_path / "brought")
    module = RewardModel(str(tmp_path / "brought"))
    Attachment.of(module).rebuild([], seed=5)
    assert torch.equal(module.model.score.weight, brought.score.weight)


# -- normalisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["validation", "training", "file"])
def test_rewards_of_reference_rows_have_mean_0_and_deviation_1(bases, tmp_path, rows):
    other = write_pairs(tmp_path / "other.jsonl", pairs(20)[8:])
    model = {"normalise_path": str(other)} if rows == "file" else {}
    module, data = job(
        bases["llama"], tmp_path, data={"val_path": None} if rows == "training" else {}, normalise="after", **model
    )
    made = fit(tmp_path, module, data, LoRA(r=4), limit_val_batches=0 if rows == "training" else None)
    raw = module.normalisation.clone()
    if rows == "file":
        data.path = str(other)
    rewards = predicted(made, module, data).double()
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-5)
    assert float(rewards.std(unbiased=False)) == pytest.approx(1, rel=1e-5)
    made.save_checkpoint(tmp_path / "one.ckpt")
    loaded = lightning_ft.load(tmp_path / "one.ckpt")
    assert torch.equal(loaded.normalisation, raw) and float(raw[1]) != 1
    torch.testing.assert_close(loaded.score([[5, 6]], [[7, 1]]), module.score([[5, 6]], [[7, 1]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_can_begin_at_deviation_1(bases, tmp_path, kind):
    module, data = job(bases[kind], tmp_path, normalise="both", lr=1e-12)
    made = fit(tmp_path, module, data, max_steps=1)
    mean, std = module.normalisation.tolist()
    assert std == pytest.approx(1, rel=1e-4)  # measured again on the head that was scaled
    assert (mean == pytest.approx(0, abs=1e-4)) == (kind == "bert")  # a bias holds it
    assert float(predicted(made, module, data).std(unbiased=False)) == pytest.approx(1, rel=1e-4)


def test_normalising_needs_rows():
    module = RewardModel("nowhere", normalise="after")
    with pytest.raises(Refusal, match="needs rows to measure rewards on"):
        trainer(".", limit_val_batches=0).fit(module, *[torch.utils.data.DataLoader([0])] * 2)
    with pytest.raises(Refusal, match="normalise is null"):
        RewardModel("nowhere", normalise_path="x.jsonl")


# -- token ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_answers_are_scored_behind_one_prompt(bases, kind):
    module = RewardModel(str(bases[kind]))
    Attachment.of(module).rebuild([], seed=0)
    module.normalisation.copy_(torch.tensor([0.5, 2.0]))
    module.train()
    prompts = [[5, 6, 7]] * 3 + [[8, 9]] + [[5, 6, 7]] * 2
    answers = [[10, 11, 1], [12], [13, 14, 1, 1], [10, 11], [15, 1], [16, 17, 18, 19]]
    found = module.score(prompts, answers)
    assert module.training and module.model.training and not found.requires_grad
    module.eval()
    with torch.no_grad():
        module.model.config.pad_token_id = None
        each = [
            module.model(input_ids=torch.tensor([p + a])).logits.item() for p, a in zip(prompts, answers, strict=True)
        ]
    torch.testing.assert_close(found, (torch.tensor(each) - 0.5) / 2, **CLOSE)
    for most in (1, 8, 11):
        torch.testing.assert_close(module.score(prompts, answers, max_tokens=most), found, **CLOSE)
    assert module.score([], []).shape == (0,)
    with pytest.raises(Refusal, match="Row 1 has an empty"):
        module.score([[1], [2]], [[1], []])
    with pytest.raises(Refusal, match="2 prompts for 1 answers"):
        module.score([[1], [2]], [[1]])


# -- what else trains, resumes, travels ---------------------------------------------------------------------------------------

PARTS = {
    "full": [],
    "lora": [LoRA(r=2)],
    "freeze": [Freeze(freeze=["re:.*\\.layers\\.1\\..*"])],
    "prefix": [PrefixTuning(2)],
    "prompt": [PromptTuning(3)],
    "adapter": [BottleneckAdapter()],
    "ia3": [IA3()],
    "nf4": [LoRA(r=2)],
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_trains_resumes_and_is_loaded(bases, tmp_path, part):
    if part == "nf4":
        pytest.importorskip("bitsandbytes")
    model = {"quantize": "nf4"} if part == "nf4" else {}
    model = {"normalise": "after", "lr": 1e-2, "optimizer": None, **model}

    def run(name, steps, layout="shared", **options):
        module, data = job(bases["llama"], tmp_path, data={**LAYOUTS[layout], "batch_size": 4}, **model)
        made = trainer(tmp_path, *PARTS[part], max_steps=steps, max_epochs=2, limit_val_batches=None)
        made.fit(module, data, **options)
        made.save_checkpoint(tmp_path / name)
        return made, module, data

    made, module, data = run("whole.ckpt", 3)
    before = RewardModel(str(bases["llama"]), base_dtype="float32")
    Attachment.of(before).rebuild([], seed=0)
    assert not torch.equal(before.model.score.weight, module.model.score.weight)
    padded = run("padded.ckpt", 3, "padded")[1]
    for name, value in weights(padded).items():  # Adam makes much of rounding
        torch.testing.assert_close(value, weights(module)[name], rtol=1e-2, atol=2e-4)
    run("two.ckpt", 2)
    _, resumed, _ = run("again.ckpt", 3, ckpt_path=tmp_path / "two.ckpt")
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(module)[name]), name
    loaded = lightning_ft.load(tmp_path / "whole.ckpt")
    ids = ([[5, 6, 7]] * 2 + [[8, 9]], [[10, 1], [11, 12, 1], [13]])
    torch.testing.assert_close(loaded.score(*ids), module.eval().score(*ids), rtol=1e-4, atol=1e-5)


def test_it_writes_no_text_and_takes_no_rows_without_pairs(bases, tmp_path):
    module, _ = job(bases["llama"], tmp_path)
    with pytest.raises(Refusal, match="writes no text"):
        module.generate(["hello"])
    rows = write_pairs(tmp_path / "rows.jsonl", [{"prompt": "hello", "completion": " you"}] * 4)
    with pytest.raises(Refusal, match="learns from pairs of answers"):
        trainer(tmp_path, limit_val_batches=0).fit(module, SFTData(str(rows), cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("ddp", {"val": False}), ("fsdp2", {"full": True})],
    ids=["ddp-lora-training-rows", "fsdp2-full-validation-rows"],
)
def test_two_ranks_learn_measure_and_normalise_as_one_does(bases, tmp_path, two_ranks, strategy, options):
    given = {"base": str(bases["llama"]), **options}
    measured, one, scores = on_ranks(folder=str(tmp_path), devices=1, strategy="auto", **given)
    (first, trained, theirs), (second, other, _) = two_ranks.run(
        "tests.modules.rewards:on_ranks", folder=str(tmp_path), devices=2, strategy=strategy, **given
    )
    assert first == second == pytest.approx(measured, rel=1e-4, abs=1e-5)
    for name, value in one.items():
        assert torch.equal(trained[name], other[name])
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, scores, rtol=1e-4, atol=1e-5)
