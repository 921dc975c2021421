"""MAML and Reptile by the name of the objective: tags, encoder-decoders, judges and policies; each loss by its own formula."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.func import functional_call

import lightning_ft
from lightning_ft import EWC, MAML, SFT, Freeze, LoRA, Refusal, Reptile, RewardModel
from lightning_ft.adapt import save
from lightning_ft.engine.attachment import Attachment
from lightning_ft.modules.reptile import in_turn
from tests.cli.conftest import call
from tests.contract.subjects import differing, trainer
from tests.modules import objective_episodes
from tests.modules.episodes import fit, words, write_words
from tests.modules.objective_episodes import BASES, data, learner
from tests.modules.tasks import write_base
from tests.tolerances import assert_gradient

TASKS = list(BASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {task: write_base(kind, folder / f"{kind}-{task}") for task, kind in BASES.items()}


def started(bases, task, tmp_path, **options):
    """A learner after two steps, with LoRA, whose reference is the base."""
    made = learner(bases[task], task, **options)
    fit(tmp_path, made, data(task), LoRA(r=2), max_steps=2)
    return made


def episode_of(bases, task, made):
    drawn = data(task)
    runner = trainer("unused")
    runner.strategy.connect(made)
    made.trainer = drawn.trainer = runner
    episode = next(iter(drawn.train_dataloader())).episodes()[0]
    return episode


def logps(model, weights, batch):
    """Summed log-probability of each row's answer, by transformers' own forward."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    said = functional_call(model, weights, (), given).logits.log_softmax(-1)
    total = []
    for row in range(len(batch.ids)):
        mine = batch.segment_of_scored == row
        places, labels = batch.scored[mine] - row * batch.ids.shape[1], batch.labels[mine]
        assert torch.equal(batch.ids[row, places + 1], labels)
        total.append(said[row, places, labels].sum())
    return torch.stack(total).reshape(-1, 2)


def by_hand(task, model, weights, rows, reference=None):
    """The mean loss of one side, from transformers' own forward and the papers' formulas."""
    batch = rows.inputs
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask.long()
    if task == "token_classification":
        logits = functional_call(model, weights, (), {"input_ids": batch.ids, "attention_mask": mask}).logits
        labels = torch.full_like(batch.ids, -100)
        labels.view(-1)[batch.scored] = rows.targets
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if task == "seq2seq_lm":
        labels = torch.full_like(batch.ids, -100)
        labels.view(-1)[batch.scored] = rows.targets
        source = {"input_ids": batch.source.ids, "attention_mask": batch.source.mask.long()}
        return functional_call(model, weights, (), {**source, "labels": labels}).loss
    if task == "reward":
        alone = [{"input_ids": ids[None, : int(m.sum())]} for ids, m in zip(batch.ids, mask, strict=True)]
        rewards = torch.stack([functional_call(model, weights, (), one).logits[0, 0] for one in alone]).reshape(-1, 2)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    own, base = logps(model, weights, batch), reference
    return -F.logsigmoid(0.3 * ((own - base)[:, 0] - (own - base)[:, 1])).mean()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_the_step_of_a_plain_loop_over_transformers_own_forward(bases, tmp_path, task, order):
    beta = {"beta": 0.3} if task == "dpo" else {}
    made = started(bases, task, tmp_path, order=order, **beta)
    episode = episode_of(bases, task, made)
    names = [name.removeprefix("model.") for name in made.inner_names]
    theta = {name: dict(made.model.named_parameters())[name] for name in names}
    known = [None, None]
    if task == "dpo":
        with torch.no_grad(), Attachment.of(made).reference("start"):
            known = [logps(made.model, {}, side.inputs) for side in (episode.support, episode.query)]
        with torch.no_grad():
            assert not torch.allclose(known[0], logps(made.model, {}, episode.support.inputs), atol=1e-4)
    phi = dict(theta)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        for _ in range(2):
            loss = by_hand(task, made.model, phi, episode.support, known[0])
            slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=order == 2)
            phi = {name: weight - 0.1 * slope for (name, weight), slope in zip(phi.items(), slopes, strict=True)}
        value = by_hand(task, made.model, phi, episode.query, known[1])
        expected = torch.autograd.grad(value, list(theta.values()))
    total, gradients, _ = made._with_gradients(episode)
    found = dict(zip((id(p) for p in made.trained()), gradients, strict=True))
    assert float(total.detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    assert max(float(g.abs().max()) for g in expected) > 1e-4
    for name, gradient in zip(names, expected, strict=True):
        assert_gradient(found[id(theta[name])], gradient, name)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_measured_and_said(bases, tmp_path, task):
    made = started(bases, task, tmp_path)
    runner = trainer(tmp_path, limit_val_batches=None)
    (measured,) = runner.validate(made, data(task), verbose=False)
    assert 0 <= measured["val/accuracy"] <= 1 and measured["val/step_0/loss"] != measured["val/loss"]
    said = runner.predict(made, data(task))[0]
    kinds = {"token_classification": "probabilities", "seq2seq_lm": "logprob", "reward": "reward", "dpo": "logp"}
    assert set(said) == {"episode", kinds[task]} and set(said["episode"].tolist()) == {0, 1}
    assert len(said["episode"]) == len(said[kinds[task]])
    if task in ("reward", "dpo"):
        assert said[kinds[task]].shape == (4, 2)


@pytest.mark.parametrize("task", TASKS)
def test_reptile_and_its_rows_in_turn(bases, tmp_path, task):
    made = learner(bases[task], task, "Reptile", inner_batch=1, steps=3, lr=0.5)
    steps, _ = fit(tmp_path, made, data(task), LoRA(r=2), max_steps=2)
    assert len(steps.losses) == 2 and all(loss > 0 for loss in steps.losses)
    episode = made.referred(episode_of(bases, task, made))
    whole = made.outputs({}, episode.support.inputs)
    parts = [in_turn(episode.support, step, 1) for step in range(3)]
    each = [made.outputs({}, one.inputs) for one in parts]
    torch.testing.assert_close(torch.cat(each), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([one.targets for one in parts]), episode.support.targets)


@pytest.mark.parametrize("task", TASKS)
def test_learning_makes_adapting_better(bases, tmp_path, task):
    """Over new tasks, after as many steps as in training, by the loss that was learned."""
    options = {"inner_lr": 0.3, "eval_steps": [], **({"inner": "all"} if task != "dpo" else {})}
    rates = {"lr": 0.2, "weight_decay": 0.0}
    made = learner(bases[task], task, **{**options, **rates})
    given = data(task, episodes=160, batch_size=8, val_episodes=40)
    parts = [LoRA(r=4)] if task == "dpo" else []
    runner = trainer(tmp_path, *parts, max_steps=20, limit_val_batches=0, max_epochs=-1)
    runner.fit(made, given)
    after = trainer(tmp_path, limit_val_batches=None).validate(made, given, verbose=False)[0]["val/loss"]
    fresh = learner(bases[task], task, **options)
    fit(tmp_path, fresh, data(task), *([LoRA(r=4)] if task == "dpo" else []), max_steps=1)
    before = trainer(tmp_path, limit_val_batches=None).validate(fresh, given, verbose=False)[0]["val/loss"]
    assert after < before


@pytest.fixture(scope="module")
def metas(bases, tmp_path_factory):
    found = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
        made = learner(bases[task], task)
        fit(folder, made, data(task), LoRA(r=2), saver, max_steps=2, enable_checkpointing=True)
        found[task] = folder
    return found


EXAMPLES = {
    "token_classification": [{"tokens": ["hello", "you"], "tags": ["Y", "N"]}, {"tokens": ["no"], "tags": ["N"]}],
    "seq2seq_lm": [{"prompt": "hello", "completion": "yes"}, {"prompt": "no", "completion": "thank you"}],
    "reward": [{"prompt": "hello", "chosen": " yes", "rejected": " no"}],
    "dpo": [{"prompt": "hello", "chosen": " yes", "rejected": " no"}],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_of_your_task(metas, tmp_path, capsys, monkeypatch, task):
    """What `adapt` gives is the start after its inner steps, under the module of plain training, and survives its file."""
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES[task]))
    path = metas[task] / "last.ckpt"
    made = lightning_ft.adapt(path, few)
    kind = RewardModel if task == "reward" else SFT
    assert isinstance(made, kind) and not made.training
    start = dict(lightning_ft.load(path).named_parameters())
    moved = [n for n, p in made.named_parameters() if n in start and not torch.equal(p, start[n])]
    assert moved and all("lora_" in n or "score" in n or "classifier" in n for n in moved)
    again = lightning_ft.load(save(made, tmp_path / "made"))
    assert isinstance(again, kind) and not differing(dict(made.state_dict()), dict(again.state_dict()))
    if task == "token_classification":
        assert again.view.labels == ["N", "Y"]
    flags = ["--ckpt_path", str(path), "--support", str(few), "--output", str(tmp_path / "out")]
    done = call(capsys, "adapt", *flags)
    words = {"token_classification": "a classifier of N, Y", "reward": "a reward model"}.get(task, "a language model")
    assert done.code == 0 and words in done.out, done.err
    done = call(capsys, "adapt", *flags[:4], "--output", str(tmp_path / "two"), "--predict", str(few))
    assert done.code == 2 and "--predict classifies texts" in done.err


def test_a_policy_adapts_against_the_reference_of_its_training(metas, tmp_path):
    """After `load` the reference is still the base: the adapted weights are those of DPO's formula."""
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(EXAMPLES["dpo"][0]) + "\n")
    made = lightning_ft.adapt(metas["dpo"] / "last.ckpt", few, steps=1)
    start = lightning_ft.load(metas["dpo"] / "last.ckpt")
    tokenizer, names = start.tokenizer, [n for n in start.inner_names]

    def said(answer):
        prompt = tokenizer("hello")["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logits = start.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return -F.cross_entropy(logits, torch.tensor(ids), reduction="sum")

    with start.reference("start"):
        known = said(" yes") - said(" no")
    loss = -F.logsigmoid(0.1 * (said(" yes") - said(" no") - known))
    assert float(loss.detach()) != pytest.approx(0.6931, abs=1e-5)  # the start has gone away from the reference
    slopes = torch.autograd.grad(loss, [dict(start.named_parameters())[n] for n in names])
    ours = dict(made.named_parameters())
    for name, slope in zip(names, slopes, strict=True):
        expected = dict(start.named_parameters())[name] - 0.1 * slope
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_two_ranks_are_one_process(bases, tmp_path, two_ranks):
    """Of a policy, whose reference passes stand beside the step."""
    given = {"base": str(bases["dpo"]), "task": "dpo", "folder": str(tmp_path)}
    measured, weights = objective_episodes.on_ranks(**given, devices=1)
    for found, theirs in two_ranks.run("tests.modules.objective_episodes:on_ranks", **given, devices=2):
        assert found == pytest.approx(measured, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_resuming_keeps_the_reference(bases, tmp_path):
    """Two epochs at once, and with a stop between: the same weights, though the start of the second fit is another model."""
    made = learner(bases["dpo"], "dpo")
    saver = ModelCheckpoint(tmp_path / "one", save_top_k=-1, every_n_epochs=1)
    runner = trainer(
        tmp_path, LoRA(r=2), saver, max_epochs=2, max_steps=-1, limit_val_batches=0, enable_checkpointing=True
    )
    runner.fit(made, data("dpo"))
    (first,) = (tmp_path / "one").glob("*step=2.ckpt")
    again = learner(bases["dpo"], "dpo")
    saver = ModelCheckpoint(tmp_path / "two", save_top_k=-1, every_n_epochs=1)
    runner = trainer(
        tmp_path, LoRA(r=2), saver, max_epochs=2, max_steps=-1, limit_val_batches=0, enable_checkpointing=True
    )
    runner.fit(again, data("dpo"), ckpt_path=first, weights_only=True)
    assert not differing(dict(made.state_dict()), dict(again.state_dict()))


def test_other_losses_of_pairs(bases, tmp_path):
    for name in ("ipo", "hinge", "simpo"):
        made = learner(bases["dpo"], "dpo", inner_loss=name, outer_loss=name, beta=0.5)
        fit(tmp_path, made, data("dpo"), LoRA(r=2), max_steps=2)
        episode = made.referred(episode_of(bases, "dpo", made))
        assert episode.query.targets.shape[1] == (2 if name == "simpo" else 4)
        outputs, known = made.outputs({}, episode.query.inputs), episode.query.targets
        found = float(made.loss(name, outputs, known).detach())
        better, worse = outputs[:, 0], outputs[:, 1]
        if name == "simpo":
            margin = 0.5 * (better / known[:, 0] - worse / known[:, 1]) - 0.5  # gamma 0.5
            expected = -F.logsigmoid(margin)
        elif name == "hinge":
            expected = (1 - 0.5 * (better - worse - known[:, 2] + known[:, 3])).relu()
        else:
            ratio = [(outputs[:, k] - known[:, 2 + k]) / known[:, k] for k in (0, 1)]
            expected = (ratio[0] - ratio[1] - 1 / (2 * 0.5)) ** 2
        assert found == pytest.approx(float(expected.mean().detach()), rel=1e-5), name


def test_what_is_refused(bases, tmp_path):
    with pytest.raises(Refusal, match="MAML.inner_loss is mse, and the task dpo has auto or sigmoid"):
        MAML("base", task="dpo", inner_loss="mse")
    with pytest.raises(Refusal, match="Reptile.outer_loss is ipo, and the task reward has auto or cross_entropy"):
        Reptile("base", task="reward", outer_loss="ipo")
    with pytest.raises(Refusal, match="MAML.beta is of the task dpo, and the task causal_lm learns by another loss"):
        MAML("base", task="causal_lm", beta=0.1)
    with pytest.raises(Refusal, match="MAML.inner_loss is sigmoid, and a net has"):
        MAML(net=torch.nn.Linear(1, 1), inner_loss="sigmoid")
    with pytest.raises(Refusal, match="MAML.way belongs to classes, and the task is reward"):
        MAML("base", task="reward", way=3)
    with pytest.raises(
        Refusal, match="judge answers, and the episodes have tags; set model.task to token_classification"
    ):
        fit(tmp_path, learner(bases["reward"], "reward"), data("token_classification"), LoRA(r=2))
    with pytest.raises(Refusal, match="tag words, and the episodes have pairs; set model.task to reward or dpo"):
        fit(tmp_path, learner(bases["token_classification"], "token_classification"), data("dpo"), LoRA(r=2))
    with pytest.raises(
        Refusal, match="and MAML of the task dpo compares answers, which have no likelihood there; use si"
    ):
        fit(tmp_path, learner(bases["dpo"], "dpo"), data("dpo"), LoRA(r=2), EWC(1.0))


def test_a_judge_and_ewc(bases, tmp_path):
    """An example is a task there, and which answer is better has a likelihood."""
    made, ewc = learner(bases["reward"], "reward"), EWC(1.0)
    fit(tmp_path, made, data("reward"), LoRA(r=2), ewc, max_steps=2)
    assert ewc._next.importance and all(bool((v >= 0).all()) for v in ewc._next.importance.values())


def strange(kind):
    good = {"tokens": ["hello"], "tags": ["a"]}
    pair = {"prompt": "hello", "chosen": " yes", "rejected": " no"}
    made = {
        "short": ([{"tokens": ["hello", "you"], "tags": ["a"]}], [good]),
        "none": ([{"tokens": ["hello"]}], [good]),
        "mixed": ([{"tokens": ["you"], "tags": [1]}], [good]),
        "many": ([{"tokens": ["hello", "you", "no"], "tags": ["a", "b", "c"]}], [good]),
        "copy": ([good], [{"tokens": ["hello"], "tags": ["b"]}]),
        "same": ([pair], [{**pair, "rejected": " yes"}]),
        "lost": ([pair], [{"chosen": " yes", "prompt": "no"}]),
        "twice": ([pair], [{**pair, "chosen": " no", "rejected": " yes"}]),
    }[kind]

    def tasks(rng, count, **_):
        return [{"support": made[0], "query": made[1]}] * count

    return tasks


@pytest.mark.parametrize(
    ("task", "kind", "said"),
    [
        ("token_classification", "short", "support, row 0 has 2 words and 1 tags"),
        ("token_classification", "none", "task 0, row 0 needs a list of tags"),
        ("token_classification", "mixed", "all names or all whole numbers"),
        ("token_classification", "many", "has 3 tags, and data.way is 2; raise it"),
        ("token_classification", "copy", "no row is left"),
        ("dpo", "same", "query, row 0: chosen and rejected are the same"),
        ("dpo", "lost", "found the columns chosen, prompt, expected prompt, chosen and rejected"),
        ("dpo", "twice", "no row is left"),
    ],
)
def test_tasks_that_are_refused(bases, monkeypatch, task, kind, said):
    monkeypatch.setattr(objective_episodes, "tags" if task == "token_classification" else "pairs", strange(kind))
    with pytest.raises(Refusal, match=said):
        next(iter(data(task, tokenizer=str(bases[task])).train_dataloader()))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop", "error"])
def test_long_rows(bases, task, truncation):
    longest = 0
    for batch in data(task, tokenizer=str(bases[task])).train_dataloader():
        longest = max(longest, *(e.support.inputs.ids.shape[1] for e in batch.episodes()))
    given = data(task, tokenizer=str(bases[task]), max_length=longest - 1, truncation=truncation)
    if truncation == "error":
        with pytest.raises(Refusal, match="max_length"):
            list(given.train_dataloader())
        return
    if truncation == "drop":
        try:
            seen = [e for batch in given.train_dataloader() for e in batch.episodes()]
        except Refusal as refusal:
            assert "no row is left" in str(refusal)
            return
    else:
        seen = [e for batch in given.train_dataloader() for e in batch.episodes()]
    assert max(e.support.inputs.ids.shape[1] for e in seen) <= longest - 1
    assert all(len(side.targets) for e in seen for side in (e.support, e.query))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("task", ["sequence_classification", *TASKS])
def test_where_only_the_head_adapts_the_rest_is_computed_once(bases, tmp_path, task, order, monkeypatch):
    """ANIL: one pass of the body over support and one over query, whatever the number of steps; with the same gradients."""
    table = write_words(tmp_path)
    rows = words(table, tmp_path) if task == "sequence_classification" else data(task)
    base = bases.get(task) or write_base("bert", tmp_path / "bert")
    given = {"inner": "head", "order": order, "steps": 3, "inner_lr": 0.1, "lr": 0.05, "eval_steps": [0, 1]}
    made = MAML(str(base), task=task, optimizer=torch.optim.SGD, **given)
    fit(tmp_path, made, rows, LoRA(r=2), Freeze(["head"]), max_steps=1)
    if task == "seq2seq_lm":  # T5's head is its embedding, which the body reads too
        assert not made._splits
        return
    assert made._splits
    episode = made.referred(next(iter(rows.train_dataloader())).episodes()[0])
    passes = []
    made.view.backbone.register_forward_hook(lambda *_: passes.append(1))
    total, gradients, _ = made._with_gradients(episode)
    assert len(passes) == 2
    numbers = made._measure_one(episode)
    assert len(passes) == 4
    monkeypatch.setattr(made, "_splits", False)
    again, expected, _ = made._with_gradients(episode)
    assert len(passes) == 8 and float(total.detach()) == pytest.approx(float(again.detach()), rel=1e-5)
    for found, other in zip(gradients, expected, strict=True):
        assert (found is None) == (other is None)
        if found is not None:
            assert_gradient(found, other, "a gradient")
    assert any(g is not None and float(g.abs().max()) > 1e-4 for g in gradients)
    torch.testing.assert_close(made._measure_one(episode), numbers, rtol=1e-4, atol=1e-5)
