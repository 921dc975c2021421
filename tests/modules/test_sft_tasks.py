"""SFT of classes, tags, numbers and answers: each overfits, its metrics are scikit-learn's, its head travels."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn import metrics as sk
from torch.nn import functional as F

import lightning_ft
from lightning_ft import SFT, Freeze, LoRA, Refusal, SFTData
from tests.contract.subjects import Steps, trainer
from tests.modules.tasks import fit, fit_on_ranks, job, rows_of, write_base
from tests.tolerances import TOL

TASKS = ("sequence_classification", "multi_label", "token_classification", "regression")
STEPS = 120
CASES = [(kind, task) for task in TASKS for kind in ("bert", "llama")] + [("t5", "seq2seq_lm")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "llama", "t5")}


def predicted(made, module, rows, key):
    """What is predicted of each row, or of each word of each row, in the order of the file."""
    rows.predict_path = rows.path
    found = {}
    for batch in made.predict(module, rows):
        parts = batch[key]
        for place, row in enumerate(batch["rows"].tolist()):
            found[row] = parts[batch["segment"] == place] if "segment" in batch else parts[place : place + 1]
    return torch.cat([found[row] for row in sorted(found)])


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_32_rows_are_learnt_by_heart(bases, tmp_path, kind, task):
    module, rows = job(bases[kind], tmp_path, task, model={"schedule": "cosine", "warmup_steps": 5})
    made = fit(module, rows, tmp_path, max_steps=STEPS, max_epochs=STEPS, check_val_every_n_epoch=STEPS)
    measured = {name: float(value) for name, value in made.callback_metrics.items()}
    if task == "regression":
        assert measured["val/loss"] < 0.01 and measured["val/pearson"] > 0.98, measured
    elif task == "seq2seq_lm":
        assert measured["val/accuracy"] > 0.98, measured
        prompts = [row["prompt"] for row in rows_of(task)[:8]]
        answers = module.generate(prompts, max_new_tokens=12)
        assert answers == [row["completion"] for row in rows_of(task)[:8]]
    else:
        assert measured["val/accuracy"] > 0.98 and measured["val/f1"] > 0.98, measured


@pytest.mark.parametrize("task", ["sequence_classification", "multi_label", "token_classification", "regression"])
def test_the_first_loss_is_that_of_transformers_own_head(bases, tmp_path, task):
    module, rows = job(bases["bert"], tmp_path, task, model={"lr": 1e-9}, batch_size=8, packing=False)
    steps = Steps()
    fit(module, rows, tmp_path, steps, max_steps=1, accumulate_grad_batches=4, limit_val_batches=0)
    losses, weights = [], []
    with torch.no_grad():
        for batch in steps.batches:
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
            if task == "token_classification":
                labels = torch.full(batch.ids.shape, -100).flatten().scatter(0, batch.scored, batch.labels)
                out = module.model(**inputs, labels=labels.view_as(batch.ids))
                weights.append(len(batch.labels))
            else:
                out = module.model(**inputs, labels=batch.targets)
                weights.append(len(batch.ids))
            losses.append(float(out.loss))
    assert len(losses) == 4
    assert steps.losses[-1] == pytest.approx(np.average(losses, weights=weights), rel=TOL[torch.float32])


def test_metrics_of_classes_are_scikit_learns(bases, tmp_path):
    module, rows = job(bases["bert"], tmp_path, "sequence_classification", batch_size=5)
    made = fit(module, rows, tmp_path, max_steps=3)
    (measured,) = made.validate(module, rows, verbose=False)
    truth = [["high", "low", "middle"].index(row["label"]) for row in rows_of("sequence_classification")]
    probabilities = predicted(made, module, rows, "probabilities").double()
    assert probabilities.shape == (32, 3)
    chosen = probabilities.argmax(-1).numpy()
    assert measured["val/accuracy"] == pytest.approx(sk.accuracy_score(truth, chosen), abs=1e-6)
    assert measured["val/f1"] == pytest.approx(sk.f1_score(truth, chosen, average="macro"), abs=1e-6)
    assert measured["val/loss"] == pytest.approx(
        sk.log_loss(truth, (probabilities / probabilities.sum(-1, keepdim=True)).numpy()), rel=1e-5
    )


def test_metrics_of_several_classes_are_scikit_learns(bases, tmp_path):
    module, rows = job(bases["bert"], tmp_path, "multi_label", batch_size=5)
    made = fit(module, rows, tmp_path, max_steps=20, max_epochs=20)
    (measured,) = made.validate(module, rows, verbose=False)
    truth = np.array([[name in row["label"] for name in "abc"] for row in rows_of("multi_label")], dtype=int)
    chosen = (predicted(made, module, rows, "probabilities") > 0.5).int().numpy()
    assert 0 < measured["val/accuracy"] == pytest.approx(sk.accuracy_score(truth, chosen), abs=1e-6)
    for name, average in (("f1", "macro"), ("f1_micro", "micro")):
        assert measured[f"val/{name}"] == pytest.approx(sk.f1_score(truth, chosen, average=average, zero_division=0))


def test_metrics_of_numbers_are_scikit_learns(bases, tmp_path):
    from scipy import stats

    module, rows = job(bases["llama"], tmp_path, "regression", batch_size=5)
    made = fit(module, rows, tmp_path, max_steps=6)
    (measured,) = made.validate(module, rows, verbose=False)
    values = predicted(made, module, rows, "value").numpy()
    truth = np.array([row["label"] for row in rows_of("regression")])
    expected = {
        "loss": sk.mean_squared_error(truth, values),
        "mae": sk.mean_absolute_error(truth, values),
        "r2": sk.r2_score(truth, values),
        "pearson": stats.pearsonr(truth, values)[0],
        "spearman": stats.spearmanr(truth, values)[0],
    }
    assert measured == pytest.approx({f"val/{name}": value for name, value in expected.items()}, rel=1e-4, abs=1e-5)


def test_token_metrics_are_scikit_learns(bases, tmp_path):
    module, rows = job(bases["bert"], tmp_path, "token_classification", batch_size=5)
    made = fit(module, rows, tmp_path, max_steps=12)
    (measured,) = made.validate(module, rows, verbose=False)
    truth = [["B-X", "I-X", "O"].index(tag) for row in rows_of("token_classification") for tag in row["tags"]]
    chosen = predicted(made, module, rows, "probabilities").argmax(-1).numpy()
    assert measured["val/accuracy"] == pytest.approx(sk.accuracy_score(truth, chosen), abs=1e-6)
    assert measured["val/f1"] == pytest.approx(sk.f1_score(truth, chosen, average="macro"), abs=1e-6)
    assert 0 <= measured["val/entity_f1"] <= 1


@pytest.mark.parametrize("weights", [[0.5, 2.0, 1.0], "balanced"])
def test_class_weights_divide_by_rows(bases, tmp_path, weights):
    model = {"class_weights": weights, "lr": 1e-9}
    module, rows = job(bases["bert"], tmp_path, "sequence_classification", model=model, packing=False)
    steps = Steps()
    fit(module, rows, tmp_path, steps, max_steps=1, limit_val_batches=0)
    (batch,) = steps.batches
    counts = batch.targets.bincount().double()
    numbers = torch.tensor(weights) if weights != "balanced" else 32 / (3 * counts)
    with torch.no_grad():
        logits = module.model(input_ids=batch.ids, attention_mask=batch.mask).logits.double()
    expected = -(numbers.double()[batch.targets] * F.log_softmax(logits, -1)[range(32), batch.targets]).mean()
    assert steps.losses[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("technique", [None, LoRA(4), Freeze(["norms"])], ids=["full", "lora", "norms"])
def test_a_new_head_trains_at_its_own_rate_beside_any_technique(bases, tmp_path, technique):
    module, rows = job(bases["bert"], tmp_path, "sequence_classification", model={"lr": 1e-3, "head_lr": 1e-2})
    made = fit(module, rows, tmp_path, *([technique] if technique else []), max_steps=1, limit_val_batches=0)
    rates = {id(p): group["lr"] for group in made.optimizers[0].param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    head = {name for name in trained if "classifier" in name or "pooler" in name}
    assert {"model.classifier.weight", "model.bert.pooler.dense.bias"} <= head < set(trained)
    assert {trained[name] for name in head} == {1e-2}
    assert {rate for name, rate in trained.items() if name not in head} == {1e-3}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_checkpoint_brings_its_head_and_its_classes(bases, tmp_path, kind):
    module, rows = job(bases[kind], tmp_path, "sequence_classification")
    made = fit(module, rows, tmp_path, LoRA(4), max_steps=4)
    made.save_checkpoint(tmp_path / "c.ckpt")
    loaded = lightning_ft.load(tmp_path / "c.ckpt")
    assert loaded.view.labels == ["high", "low", "middle"]
    batch = next(iter(rows.val_dataloader()))
    module.eval()
    with torch.no_grad():
        assert torch.equal(
            loaded.predict_step(batch, 0)["probabilities"], module.predict_step(batch, 0)["probabilities"]
        )


def test_a_resumed_run_ends_with_the_same_weights(bases, tmp_path):
    finals = []
    for checkpoint in (None, tmp_path / "step=3.ckpt"):
        module, rows = job(bases["bert"], tmp_path, "token_classification", batch_size=4)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        made = trainer(tmp_path, LoRA(4), saving, max_steps=7, limit_val_batches=0, enable_checkpointing=True)
        made.fit(module, rows, ckpt_path=checkpoint)
        finals.append({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
    assert len(finals[0]) > 2
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "causal_lm", "head_lr": 1e-3}, "SFT.head_lr belongs to classification, and the task is causal_lm"),
        ({"task": "seq2seq_lm", "labels": ["a", "b"]}, "SFT.labels belongs to classification"),
        ({"task": "sequence_classification", "class_weights": [-1.0, 1.0]}, "class_weights"),
    ],
)
def test_arguments_that_mean_nothing(arguments, words):
    with pytest.raises(Refusal, match=words):
        SFT("b", **arguments)


def test_labels_must_be_those_of_the_data(bases, tmp_path):
    module, rows = job(bases["bert"], tmp_path, "sequence_classification", model={"labels": ["low", "middle", "high"]})
    with pytest.raises(
        Refusal, match=r"labels \['low', 'middle', 'high'\] are not the data's \['high', 'low', 'middle'\]"
    ):
        fit(module, rows, tmp_path, max_steps=1)


def test_the_data_must_be_for_the_task(bases, tmp_path):
    _, rows = job(bases["bert"], tmp_path, "sequence_classification")
    module = SFT(str(bases["bert"]), task="regression")
    with pytest.raises(Refusal, match="set the module's task to sequence_classification"):
        fit(module, rows, tmp_path, max_steps=1)


@pytest.mark.parametrize(("task", "fitting"), [("seq2seq_lm", "Seq2SeqData"), ("regression", "ClassificationData")])
def test_rows_to_imitate_are_for_a_decoder_alone(bases, tmp_path, task, fitting):
    """Before the base is loaded."""
    module, path = SFT(str(bases["t5"]), task=task), tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "hello", "completion": " world"}\n' * 8)
    with pytest.raises(Refusal, match=f"SFT.task is {task}, but SFTData is for causal_lm: take {fitting}"):
        fit(module, SFTData(str(path), packing=False, cache_dir=str(tmp_path / "cache")), tmp_path, max_steps=1)
    assert module.model is None


def test_a_classifier_writes_no_text(bases, tmp_path):
    module, rows = job(bases["bert"], tmp_path, "sequence_classification")
    fit(module, rows, tmp_path, max_steps=1, limit_val_batches=0)
    with pytest.raises(Refusal, match="writes no text"):
        module.generate(["hello"])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_packed_rows_give_the_loss_of_padded_ones_and_are_taken_where_they_can(bases, tmp_path, kind):
    losses, shapes = {}, {}
    for packing in (False, True, None):
        module, rows = job(bases[kind], tmp_path, "sequence_classification", packing=packing)
        steps = Steps()
        fit(module, rows, tmp_path, steps, max_steps=3, limit_val_batches=0)
        losses[packing], shapes[packing] = steps.losses, [len(batch.ids) for batch in steps.batches]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[None] == losses[True] and shapes[None] == shapes[True] == [1] * 3 != shapes[False]


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "sequence_classification"),
        ("bert", "multi_label"),
        ("bert", "token_classification"),
        ("llama", "regression"),
        ("t5", "seq2seq_lm"),
    ],
)
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_learn_and_measure_what_one_does(bases, tmp_path, two_ranks, kind, task, fsdp2):
    given = {"base": str(bases[kind]), "task": task}
    measured, weights = fit_on_ranks(folder=str(tmp_path), devices=1, **given)
    (first, trained), (second, other) = two_ranks.run(
        "tests.modules.tasks:fit_on_ranks", folder=str(tmp_path), devices=2, fsdp2=fsdp2, **given
    )
    assert first == second == pytest.approx(measured, rel=1e-5, abs=1e-6)
    for name, value in weights.items():
        assert torch.equal(trained[name], other[name])
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "task"),
    [("bert", "sequence_classification"), ("bert", "token_classification"), ("llama", "sequence_classification")],
)
def test_an_adapter_on_the_head_of_packed_rows_learns(tmp_path, kind, task):
    """The head is asked for before LoRA takes its place: packed rows go through what stands there now."""
    base = write_base(kind, tmp_path / kind)
    seen = {}
    for packing in (True, False):
        module, data = job(base, tmp_path, task, packing=packing)
        layer = "score" if kind == "llama" else "classifier"
        trainer(tmp_path, LoRA(r=2, target=[layer]), max_steps=2).fit(module, data)
        seen[packing] = dict(module.model.named_parameters())[f"{layer}.lora_B"].detach()
    assert float(seen[True].abs().max()) > 0
    torch.testing.assert_close(seen[True], seen[False], rtol=1e-3, atol=1e-5)
