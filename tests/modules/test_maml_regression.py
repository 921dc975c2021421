"""MAML and Reptile over a base that estimates numbers of texts: the meta-gradient, what is measured, what comes of `adapt`."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.func import functional_call

import lightning_ft
from lightning_ft import MAML, EpisodeData, LoRA, ProtoNet, Refusal, Reptile
from lightning_ft.adapt import save
from tests.cli.conftest import call
from tests.contract.subjects import trainer
from tests.modules.episodes import fit, words, write_words
from tests.modules.tasks import WORDS, write_base
from tests.modules.text_episodes import answers
from tests.tolerances import assert_gradient


def moods(rng, count, *, shot=4, query=3):
    """Of each task its own value for each word; a text's number is their mean."""
    tasks = []
    for _ in range(count):
        value = dict(zip(WORDS, rng.normal(size=len(WORDS)).tolist(), strict=True))
        rows = {}
        while len(rows) < shot + query:
            said = rng.choice(WORDS, size=rng.integers(1, 4)).tolist()
            rows[" ".join(said)] = float(np.mean([value[word] for word in said]))
        made = [{"text": text, "label": number} for text, number in rows.items()]
        tasks.append({"support": made[:shot], "query": [*made[shot:], {**made[0], "label": 9.0}]})
    return tasks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base("bert", tmp_path_factory.mktemp("estimator") / "bert")


def data(base=None, **options):
    given = {"batch_size": 2, "episodes": 4, "val_episodes": 3, "seed": 3, **options}
    return EpisodeData(tasks=f"{__name__}.moods", tokenizer=None if base is None else str(base), **given)


def estimator(base, **options):
    given = {"inner": "adapter_and_head", "inner_lr": 0.1, "steps": 2, "lr": 0.01, "eval_steps": [0], **options}
    return MAML(str(base), task="regression", optimizer=torch.optim.SGD, **given)


def test_rows_are_texts_with_numbers(base):
    """What is asked is the text, whatever its number: the query's copy of a support row is left out."""
    (batch,) = data(base, batch_size=4).train_dataloader()
    tokenizer = estimator(base).tokenizer
    drawn = moods(np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, 101, 0, 0]))), 64)
    for episode, task in zip(batch.episodes(), drawn, strict=False):
        for side, rows in ((episode.support, task["support"]), (episode.query, task["query"][:-1])):
            assert side.targets.tolist() == pytest.approx([row["label"] for row in rows])
            lengths = side.inputs.mask.sum(1) if side.inputs.mask is not None else [side.inputs.ids.shape[1]] * 9
            for ids, n, row in zip(side.inputs.ids.tolist(), lengths, rows, strict=False):
                assert ids[: int(n)] == tokenizer(row["text"])["input_ids"]


def plain_loss(model, weights, rows):
    """The mean squared error by transformers' own forward."""
    mask = torch.ones_like(rows.inputs.ids) if rows.inputs.mask is None else rows.inputs.mask.long()
    given = {"input_ids": rows.inputs.ids, "attention_mask": mask}
    said = functional_call(model, weights, (), given).logits[:, 0]
    return ((said - rows.targets) ** 2).mean()


@pytest.mark.parametrize("order", [1, 2])
def test_the_step_of_a_plain_loop(base, tmp_path, order):
    made = estimator(base, order=order)
    steps, runner = fit(tmp_path, made, data(), LoRA(r=2), max_steps=2, limit_val_batches=None)
    assert len(steps.losses) == 2 and made.model.config.num_labels == 1
    assert {name for name in runner.callback_metrics if "accuracy" in name} == set()
    # A third step by hand, from where the run has ended.
    episode = next(iter(data(base).train_dataloader())).episodes()[0]
    names = [name.removeprefix("model.") for name in made.inner_names]
    theta = {name: dict(made.model.named_parameters())[name] for name in names}
    phi = dict(theta)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        for _ in range(2):
            loss = plain_loss(made.model, phi, episode.support)
            slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=order == 2)
            phi = {name: weight - 0.1 * slope for (name, weight), slope in zip(phi.items(), slopes, strict=True)}
        expected = torch.autograd.grad(plain_loss(made.model, phi, episode.query), list(theta.values()))
    total, gradients, _ = made._with_gradients(episode)
    found = dict(zip((id(p) for p in made.trained()), gradients, strict=True))
    assert float(total.detach()) < 10
    assert float(total.detach()) == pytest.approx(float(plain_loss(made.model, phi, episode.query).detach()), rel=1e-5)
    for name, gradient in zip(names, expected, strict=True):
        assert_gradient(found[id(theta[name])], gradient, name)


def test_what_is_measured_and_said(base, tmp_path):
    made = estimator(base)
    fit(tmp_path, made, data(), LoRA(r=2), max_steps=2)
    runner = trainer(tmp_path, limit_val_batches=None)
    (found,) = runner.validate(made, data(), verbose=False)
    episodes = [episode for batch in data(base).val_dataloader() for episode in batch.episodes()]
    losses = []
    for episode in episodes:
        weights = {name.removeprefix("model."): weight for name, weight in made.adapt(episode.support).items()}
        losses.append(float(plain_loss(made.model, weights, episode.query).detach()))
    assert found["val/loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4) and "val/accuracy" not in found
    assert found["val/step_0/loss"] != found["val/loss"]
    first = runner.predict(made, data(test_episodes=2))[0]
    assert first["value"].shape == (6, 1) and first["episode"].tolist() == [0, 0, 0, 1, 1, 1]


def test_reptile_takes_rows_in_turn(base, tmp_path):
    made = Reptile(str(base), task="regression", inner_batch=2, steps=4, inner_lr=0.01, eval_steps=[0])
    steps, _ = fit(tmp_path, made, data(), max_steps=2)
    assert len(steps.losses) == 2 and all(np.isfinite(steps.losses))


def test_a_model_of_your_numbers(base, tmp_path, capsys, monkeypatch):
    """Its weights are the start after plain steps on the examples; it survives its file."""
    saver = ModelCheckpoint(tmp_path / "meta", save_last=True, every_n_train_steps=1)
    fit(tmp_path, estimator(base), data(), LoRA(r=2), saver, max_steps=1, enable_checkpointing=True)
    path, support = tmp_path / "meta/last.ckpt", tmp_path / "mine.csv"
    (task,) = moods(np.random.default_rng(5), 1)
    with support.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([row["text"], row["label"]] for row in task["support"])])
    meta = lightning_ft.load(path)
    assert meta.task == "regression" and meta.way is None
    encoded = dict(meta.tokenizer([row["text"] for row in task["support"]], padding=True, return_tensors="pt"))
    labels = torch.tensor([row["label"] for row in task["support"]])
    inner = {name: p for name, p in meta.named_parameters() if name in meta.inner_names}
    for _ in range(2):
        loss = ((meta.model(**encoded).logits[:, 0] - labels) ** 2).mean()
        slopes = torch.autograd.grad(loss, list(inner.values()))
        with torch.no_grad():
            for p, slope in zip(inner.values(), slopes, strict=True):
                p.sub_(0.1 * slope)
    made = lightning_ft.adapt(path, support)
    again = lightning_ft.load(save(made, tmp_path / "saved"))
    with torch.no_grad():
        expected = meta.model(**encoded).logits
        torch.testing.assert_close(made.model(**encoded).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.model(**encoded).logits, made.model(**encoded).logits, rtol=0, atol=0)
    assert made.task == "regression"
    given = ["adapt", "--ckpt_path", str(path), "--support", str(support), "--output", str(tmp_path / "out")]
    refused = call(capsys, *given, "--predict", str(support))
    assert refused.code == 2 and "this checkpoint learned to estimate numbers" in refused.err
    done = call(capsys, *given)
    assert done.code == 0 and "a regression, adapted in" in done.out, done.err
    with pytest.raises(Refusal, match="has no column 'score'"):
        lightning_ft.adapt(path, support, label_column="score", base="no/such_base")
    support.write_text("text,label\nhello,warm\n")
    with pytest.raises(Refusal, match="mine.csv, row 0: the label 'warm' is no number"):
        lightning_ft.adapt(path, support)


def test_what_does_not_fit_is_refused(base, tmp_path):
    with pytest.raises(Refusal, match="MAML.way belongs to classes, and the task is regression"):
        estimator(base, way=3)
    with pytest.raises(Refusal, match="task regression is for a base"):
        MAML(net=torch.nn.Linear(1, 1), task="regression")
    with pytest.raises(
        Refusal, match="tell classes apart, and the episodes have numbers; set model.task to regression"
    ):
        fit(tmp_path, MAML(str(base), way=3), data())
    with pytest.raises(Refusal, match="estimate numbers, and the episodes have classes; leave model.task out"):
        fit(tmp_path, estimator(base), words(write_words(tmp_path), tmp_path))
    with pytest.raises(Refusal, match="estimate numbers, and the episodes have answers; set model.task to causal_lm"):
        fit(tmp_path, estimator(base), answers())
    with pytest.raises(Refusal, match="ProtoNet learns to tell classes apart, and the episodes have numbers"):
        fit(tmp_path, ProtoNet(str(base)), data())
