"""MAML and Reptile over a language model: the meta-gradient, what adapts, what is measured, and what comes of `adapt`."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.func import functional_call

import lightning_ft
from lightning_ft import SFT, Freeze, LoRA, PrefixTuning, Refusal, Reptile
from lightning_ft.adapt import save
from lightning_ft.modules.reptile import in_turn
from tests.cli.conftest import call
from tests.contract.subjects import differing
from tests.modules.episodes import fit, sines, words, write_words
from tests.modules.tasks import write_base
from tests.modules.text_episodes import answers, writer
from tests.tolerances import assert_gradient


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base("llama", tmp_path_factory.mktemp("writer") / "llama")


def episodes(base, **options):
    data = answers(tokenizer=str(base), **options)
    return [episode for batch in data.train_dataloader() for episode in batch.episodes()]


def loss_of(model, weights, rows):
    """The mean over all scored tokens, by transformers' own forward and its own shift of labels."""
    batch = rows.inputs
    labels = torch.full_like(batch.ids, -100)
    labels.view(-1)[batch.scored + 1] = batch.ids.view(-1)[batch.scored + 1]
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels}
    return functional_call(model, weights, (), inputs).loss


def plain_step(model, names, episode, *, order, steps, alpha):
    """The query loss after ``steps`` of the paper's equation, with its graph."""
    theta = {name: dict(model.named_parameters())[name] for name in names}
    phi = dict(theta)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        for _ in range(steps):
            slopes = torch.autograd.grad(
                loss_of(model, phi, episode.support), list(phi.values()), create_graph=order == 2
            )
            phi = {name: weight - alpha * slope for (name, weight), slope in zip(phi.items(), slopes, strict=True)}
        return loss_of(model, phi, episode.query)


def test_what_is_scored_is_the_answers(base):
    tokenizer = writer(base).tokenizer
    for episode in episodes(base):
        assert not {*tokenizer.batch_decode(episode.support.inputs.ids)} & {
            *tokenizer.batch_decode(episode.query.inputs.ids)
        }
        for side in (episode.support, episode.query):
            batch = side.inputs
            for row in range(len(batch.ids)):
                scored = tokenizer.decode(side.targets[batch.segment_of_scored == row])
                whole = tokenizer.decode(batch.ids[row][batch.mask[row]])
                assert whole.endswith(scored) and len(scored.split()) in (2, 3) and scored.endswith(tokenizer.eos_token)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layout", [{}, {"batch_size": 1}], ids=["whole", "accumulated"])
def test_the_step_of_a_plain_loop_over_transformers_own_loss(base, tmp_path, order, layout):
    made = writer(base, order=order, optimizer=torch.optim.SGD)
    steps, _ = fit(
        tmp_path, made, answers(**layout), LoRA(r=2), max_steps=1, accumulate_grad_batches=2 if layout else 1
    )
    again = writer(base, order=order, optimizer=torch.optim.SGD, lr=1e-12)
    fit(tmp_path, again, answers(), LoRA(r=2), max_steps=1)  # the same start, for the oracle
    names = [name.removeprefix("model.") for name in again.inner_names]
    assert names and all("lora_" in name for name in names)
    losses = [plain_step(again.model, names, e, order=order, steps=2, alpha=0.5) for e in episodes(base)[:2]]
    found = torch.autograd.grad(sum(losses) / 2, [dict(again.model.named_parameters())[n] for n in names])
    assert steps.losses == pytest.approx([float(sum(losses).detach()) / 2], rel=1e-5)
    assert max(float(g.abs().max()) for g in found) > 1e-3
    for name, gradient in zip(names, found, strict=True):
        assert_gradient(steps.gradients[0][f"model.{name}"], gradient, name, 1e-3)


def in_double(made):
    """Transformers' norm computes in float32 whatever it is given."""
    for layer in list(made.modules()):
        for name, child in list(layer.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(layer, name, norm)
    made.double()


@pytest.mark.parametrize("part", ["lora", "prefix"])
def test_the_second_order_is_a_finite_difference(base, tmp_path, part):
    """In float64, through the head, attention, norms and what is injected; the first order is another number."""
    made = writer(base)
    fit(tmp_path, made, answers(), LoRA(r=2) if part == "lora" else PrefixTuning(tokens=2), max_steps=2)
    in_double(made)
    (episode, *_) = episodes(base)
    parameters = dict(made.named_parameters())
    name = next(n for n in made.inner_names if "lora_A" in n or part == "prefix")

    def value(order=2):
        fast = list(made.adapted(episode.support, steps=2, order=order))[-1]
        return made.measure(made.outputs(fast, episode.query.inputs), episode.query.targets)[0]

    gradients = {order: torch.autograd.grad(value(order), parameters[name])[0] for order in (1, 2)}
    assert value().dtype == torch.float64
    place = int(gradients[2].abs().argmax())
    ends = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            parameters[name].view(-1)[place] += sign * 1e-6
        ends.append(float(value().detach()))
    slope = float(gradients[2].view(-1)[place])
    assert abs(slope) > 1e-5 and slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    assert float(gradients[1].view(-1)[place]) != pytest.approx(slope, rel=1e-3)


def test_the_whole_model_and_its_tied_head_may_adapt(base, tmp_path):
    for inner in ("all", "head", ["norms"]):
        made = writer(base, inner=inner, inner_lr=0.1)
        _, runner = fit(tmp_path, made, answers(), max_steps=2, limit_val_batches=None)
        assert {"val/loss", "val/accuracy", "val/step_0/loss", "val/step_2/accuracy_ci95"} <= set(
            runner.callback_metrics
        )


def test_reptile_takes_rows_with_their_tokens(base, tmp_path):
    (episode, *_) = episodes(base)
    rows = episode.support
    seen = [in_turn(rows, step, 1) for step in range(3)]
    assert in_turn(rows, 0, 3) is rows
    for at, one in enumerate(seen):
        assert torch.equal(one.inputs.ids[0], rows.inputs.ids[at])
        assert torch.equal(one.targets, rows.targets[rows.inputs.segment_of_scored == at])
        assert torch.equal(one.inputs.ids.view(-1)[one.inputs.scored + 1], one.targets)
    made = Reptile(str(base), task="causal_lm", steps=3, inner_batch=1, inner_lr=0.1, lr=0.5, eval_steps=[0])
    steps, _ = fit(tmp_path, made, answers(), LoRA(r=2), max_steps=2)
    assert steps.gradients and all("lora_" in name for name in steps.gradients[0])


@pytest.fixture(scope="module")
def meta(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    made = writer(base, inner="all", inner_lr=0.1)
    parts = LoRA(r=2), Freeze(["norms", "head"])  # a random head says little by its input alone
    fit(folder, made, answers(episodes=20), *parts, saver, max_steps=10, enable_checkpointing=True)
    rows = [{"prompt": "hello", "completion": " yes"}, {"prompt": "no", "completion": " yes"}]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, made, rows


def test_an_adapted_language_model_writes(meta, tmp_path):
    """Its weights are the start after plain steps on the examples; it writes what that model writes, also from its own file."""
    folder, _, rows = meta
    start = lightning_ft.load(folder / "last.ckpt")
    # Two steps: at this rate rounding grows three hundredfold a step.
    made = lightning_ft.adapt(folder / "last.ckpt", folder / "mine.jsonl", steps=2)
    assert isinstance(made, SFT) and made.task == "causal_lm"
    tokenizer, names = start.tokenizer, [name.removeprefix("model.") for name in start.inner_names]
    parameters = dict(start.model.named_parameters())
    for _ in range(2):
        total = 0.0
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            logits = start.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            row["count"] = len(answer)
        slopes = torch.autograd.grad(total / sum(row["count"] for row in rows), [parameters[n] for n in names])
        with torch.no_grad():
            for name, slope in zip(names, slopes, strict=True):
                parameters[name].sub_(0.1 * slope)
    ours = dict(made.model.named_parameters())
    for name in names:
        torch.testing.assert_close(ours[name], parameters[name], rtol=1e-3, atol=1e-5, msg=name)
    again = lightning_ft.load(save(made, tmp_path / "out"))
    assert not differing(dict(made.state_dict()), dict(again.state_dict()))
    prompts = ["hello", "no", "sentence", "you"]
    before = lightning_ft.load(folder / "last.ckpt").generate(prompts, max_new_tokens=8)
    written = again.generate(prompts, max_new_tokens=8)
    assert written == start.generate(prompts, max_new_tokens=8) and written != before
    with pytest.raises(Refusal, match="examples with classes"):
        lightning_ft.adapt(folder / "last.ckpt", folder / "mine.jsonl", label_column="label")


def test_on_the_command_line(meta, tmp_path, capsys, monkeypatch):
    folder = meta[0]
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    words_ = ["--ckpt_path", str(folder / "last.ckpt"), "--support", str(folder / "mine.jsonl"), "--steps", "5"]
    done = call(capsys, "adapt", *words_, "--output", str(tmp_path / "out"))
    assert done.code == 0 and "a language model, adapted in" in done.out, done.err
    flags = ["--prompt", "no", "--raw", "true", "--max_new_tokens", "8"]
    wrote = call(capsys, "generate", "--ckpt_path", str(tmp_path / "out/adapted.ckpt"), *flags)
    made = lightning_ft.adapt(folder / "last.ckpt", folder / "mine.jsonl", steps=5)
    assert wrote.code == 0 and wrote.out.strip() == made.generate(["no"], max_new_tokens=8)[0].strip(), wrote.err
    (tmp_path / "texts.jsonl").write_text('{"text": "no"}\n')
    done = call(capsys, "adapt", *words_, "--output", str(tmp_path / "two"), "--predict", str(tmp_path / "texts.jsonl"))
    assert done.code == 2 and "learned to write" in done.err
    done = call(capsys, "adapt", *words_, "--output", str(tmp_path / "two"), "--max_length", "2")
    assert done.code == 2 and "more than max_length 2" in done.err


def test_a_base_that_writes_learns_no_classes_and_the_other_way_round(base, tmp_path):
    table = write_words(tmp_path)
    with pytest.raises(Refusal, match="write answers, and the episodes have classes; leave model.task out"):
        fit(tmp_path, writer(base), words(table, tmp_path), LoRA(r=2))
    bert = write_base("bert", tmp_path / "bert")
    with pytest.raises(Refusal, match="the episodes have answers; set model.task to causal_lm"):
        fit(tmp_path, lightning_ft.MAML(str(bert), way=3), answers(), LoRA(r=2))
    with pytest.raises(Refusal, match="belong to classes"):
        writer(base, way=3)
    with pytest.raises(Refusal, match="leave it out for a net"):
        lightning_ft.MAML(net=torch.nn.Linear(1, 1), task="causal_lm")
    with pytest.raises(Refusal, match="the episodes have classes"):
        fit(tmp_path, writer(base), sines(), LoRA(r=2))


def bad(kind):
    def tasks(rng: np.random.Generator, count: int):
        row = {"prompt": "hello", "completion": " yes"}
        made = {"keys": {"rows": [row]}, "columns": {"support": [{"question": "a"}], "query": [row]}}
        made["same"] = {"support": [row], "query": [row]}
        made["empty"] = {"support": [row], "query": [{"prompt": "no", "completion": ""}]}
        return [made[kind]] * (count if kind != "few" else 1)

    return tasks


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("keys", "must be a dictionary with support and query"),
        ("columns", "found the columns question"),
        ("same", "rows that stand in the support do not count"),
        ("empty", "task 0, query, row 0"),
    ],
)
def test_tasks_that_are_refused(base, monkeypatch, kind, said):
    import tests.modules.text_episodes as module

    monkeypatch.setattr(module, "codes", bad(kind))
    with pytest.raises(Refusal, match=said):
        episodes(base)


def test_long_rows(base):
    with pytest.raises(Refusal, match="more than max_length 3; raise it"):
        episodes(base, max_length=3, truncation="error")
    with pytest.raises(Refusal, match="no token to learn within max_length 3"):
        episodes(base, max_length=3, truncation="keep_start")
    for episode in episodes(base, max_length=4, truncation="keep_end"):
        assert episode.support.inputs.ids.shape[1] == 4 and len(episode.support.targets)
