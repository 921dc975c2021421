"""A meta-learned checkpoint and a file of examples -> a classifier, in Python and on the command line."""

import csv
import json
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from lightning_ft import IA3, MAML, SFT, LoRA, PrefixTuning, ProtoNet, Refusal
from lightning_ft.adapt import classify, save
from lightning_ft.engine.attachment import Attachment
from tests.cli.conftest import call
from tests.modules.episodes import fit, mlp, module, sines, words, write_words
from tests.modules.tasks import write_base


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with checkpoints of MAML over LoRA, over a prefix, and of a net; and support files of two and three classes."""
    folder = tmp_path_factory.mktemp("adapt")
    base, path = write_base("bert", folder / "bert"), write_words(folder)
    for name, part in (("lora", LoRA(r=2)), ("prefix", PrefixTuning(tokens=2))):
        rates = "per_parameter" if name == "lora" else "fixed"
        made = MAML(str(base), inner="adapter_and_head", rates=rates, inner_lr=0.5, steps=2, lr=0.05, eval_steps=[])
        saver = ModelCheckpoint(folder / name, save_last=True, every_n_train_steps=1)
        fit(folder, made, words(path, folder), part, saver, max_steps=3, enable_checkpointing=True)
    saver = ModelCheckpoint(folder / "net", save_last=True, every_n_train_steps=1)
    fit(folder, module(), sines(), saver, max_steps=1, enable_checkpointing=True)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for count in (2, 3, 4):
        chosen = [row for row in rows if int(row["label"][-1]) < count]
        (folder / f"{count}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize("count", [2, 3])
def test_an_adapted_classifier(job, tmp_path, kind, count):
    """Its weights are the start after plain steps on the examples, and it survives its file."""
    meta = lightning_ft.load(job / f"{kind}/last.ckpt")
    made = lightning_ft.adapt(job / f"{kind}/last.ckpt", job / f"{count}.jsonl", steps=3, cache_dir=str(job / "cache"))
    assert isinstance(made, SFT) and made.view.labels == [f"class {k}" for k in range(count)]
    assert [type(t) for t in Attachment.of(made).techniques] == [type(t) for t in Attachment.of(meta).techniques]
    rows = [json.loads(line) for line in (job / f"{count}.jsonl").read_text().splitlines()]
    encoded = meta.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([int(row["label"][-1]) for row in rows])
    inner = {name: p for name, p in meta.named_parameters() if name in meta.inner_names}
    rates = {n: meta.step_rates(0)[n] for n in inner}
    for _ in range(3):
        logits = meta.model(**encoded).logits[:, :count]
        slopes = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), list(inner.values()))
        with torch.no_grad():
            for (name, p), slope in zip(inner.items(), slopes, strict=True):
                p.sub_(rates[name] * slope)
    with torch.no_grad():
        expected = meta.model(**encoded).logits[:, :count]
        torch.testing.assert_close(made.model(**encoded).logits, expected, rtol=1e-4, atol=1e-5)
    again = lightning_ft.load(save(made, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(**encoded).logits, made.model(**encoded).logits, rtol=0, atol=0)
    said = list(classify(again, [row["text"] for row in rows]))
    best = expected.softmax(-1).max(-1)
    assert [label for label, _ in said] == [f"class {k}" for k in best.indices.tolist()]
    assert [p for _, p in said] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_on_the_command_line(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    words_ = ["--ckpt_path", str(job / "lora/last.ckpt"), "--support", str(job / "2.jsonl")]
    out = tmp_path / "out"
    done = call(capsys, "adapt", *words_, "--output", str(out), "--predict", str(job / "3.jsonl"), "--steps", "4")
    assert done.code == 0, done.err
    assert "a classifier of class 0, class 1, adapted in" in done.out
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == len((job / "3.jsonl").read_text().splitlines())
    assert {line["label"] for line in lines} <= {"class 0", "class 1"}
    merged = call(capsys, "merge", "--ckpt_path", str(out / "adapted.ckpt"), "--output", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "class 0", 1: "class 1"}
    again = call(capsys, "adapt", *words_, "--output", str(out))
    assert again.code == 2 and "already holds something" in again.err
    assert call(capsys, "adapt", *words_).code == 2


@pytest.mark.parametrize("rates", ["per_parameter", "per_step"])
def test_rates_follow_a_head_that_is_cut(job, tmp_path, rates):
    """As many steps as classes: rates of a step each are as many as those of the head's bias, and are not cut."""
    made = MAML(str(job / "bert"), inner="head", rates=rates, inner_lr=0.5, steps=3, lr=0.05, eval_steps=[])
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(tmp_path, made, words(job / "words.csv", job), saver, max_steps=1, enable_checkpointing=True)
    meta = lightning_ft.load(tmp_path / "last.ckpt")
    meta.keep_classes_(2)
    name = next(name for name in meta.inner_names if name.endswith("classifier.bias"))
    rate = dict(meta.named_parameters())["inner_rates." + name.replace(".", "/")]
    before = dict(made.named_parameters())["inner_rates." + name.replace(".", "/")]
    assert torch.equal(rate, before if rates == "per_step" else before[:2])
    assert len(lightning_ft.adapt(tmp_path / "last.ckpt", job / "2.jsonl", cache_dir=str(job / "c")).view.labels) == 2


@pytest.fixture
def no_base(monkeypatch):
    """A base model that is asked for is an error."""
    monkeypatch.setattr(sys.modules["lightning_ft.adapt"], "load", lambda *_, **__: pytest.fail("the base was loaded"))


ON_THE_HEAD = {
    "lora": lambda: LoRA(r=3, target=["classifier"]),  # as many as classes
    "dora": lambda: LoRA(r=2, target=["classifier"], dora=True),
    "pissa": lambda: LoRA(r=2, target=["classifier"], init="pissa"),
    "ia3": lambda: IA3(target=["classifier"]),
    "ia3 of the input": lambda: IA3(target=["classifier"], feedforward=["classifier"]),
}


@pytest.mark.parametrize("part", ON_THE_HEAD)
def test_adapters_on_a_head_that_is_cut(job, tmp_path, part):
    """They say for two of three classes what they said for all, with their rates."""
    made = MAML(str(job / "bert"), inner="adapter", rates="per_parameter", inner_lr=0.5, lr=0.05, eval_steps=[])
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(
        tmp_path,
        made,
        words(job / "words.csv", job),
        ON_THE_HEAD[part](),
        saver,
        max_steps=2,
        enable_checkpointing=True,
    )
    meta = lightning_ft.load(tmp_path / "last.ckpt")
    meta.adapt_(made_rows(job, meta.tokenizer))
    said = dict(meta.tokenizer(["hello world", "no no"], return_tensors="pt"))
    with torch.no_grad():
        before = meta.model(**said).logits
        meta.keep_classes_(2)
        torch.testing.assert_close(meta.model(**said).logits, before[:, :2])
    for name in meta.inner_names:
        assert meta.inner_rates[name.replace(".", "/")].numel() == dict(meta.named_parameters())[name].numel()
    found = lightning_ft.adapt(tmp_path / "last.ckpt", job / "2.jsonl", steps=0, cache_dir=str(job / "c"))
    again = lightning_ft.load(tmp_path / "last.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(found.model(**said).logits, again.model(**said).logits[:, :2])


def made_rows(job, tokenizer):
    data = words(job / "words.csv", job, episodes=1, batch_size=1)
    data.use_tokenizer(tokenizer)
    (batch,) = data.train_dataloader()
    return batch.episodes()[0].support


@pytest.mark.parametrize("length", [8, None])
def test_texts_are_cut_as_in_training(job, tmp_path, length, monkeypatch, capsys):
    made = MAML(str(job / "bert"), inner="head", inner_lr=0.5, lr=0.05, eval_steps=[])
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    data = words(job / "words.csv", job, max_length=length)
    fit(tmp_path, made, data, saver, max_steps=1, enable_checkpointing=True)
    widths = []
    original = MAML.adapt_
    monkeypatch.setattr(
        MAML, "adapt_", lambda self, rows, **o: widths.append(rows.inputs.ids.shape[1]) or original(self, rows, **o)
    )
    path = tmp_path / "last.ckpt"
    lightning_ft.adapt(path, job / "2.jsonl", cache_dir=str(job / "c"))
    lightning_ft.adapt(path, job / "2.jsonl", max_length=7, cache_dir=str(job / "c"))
    assert widths == [length or 9, 7]
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    asked = []
    module_ = sys.modules["lightning_ft.adapt"]
    monkeypatch.setattr(
        module_,
        "classify",
        lambda _, texts, max_length, keep_end: asked.append((max_length, keep_end)) or [("yes", 1.0)] * len(texts),
    )
    given = ["--ckpt_path", str(path), "--support", str(job / "2.jsonl"), "--output", str(tmp_path / "out")]
    call(capsys, "adapt", *given, "--predict", str(job / "2.jsonl"))
    assert asked == [(length, False)] and widths[2] == (length or 9)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "error", "drop"])
def test_texts_are_cut_at_the_end_that_training_cut(job, tmp_path, truncation, monkeypatch, capsys):
    """Or refused, where training cut none; the same of texts to classify, which are never refused."""
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    made = MAML(str(job / "bert"), inner="head", inner_lr=0.5, lr=0.05, eval_steps=[])
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    data = words(job / "words.csv", job, max_length=None, truncation=truncation)
    fit(tmp_path, made, data, saver, max_steps=1, enable_checkpointing=True)
    few = tmp_path / "few.jsonl"
    rows = [("yes yes yes no no no", "a"), ("no no no no", "b")]
    few.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    seen = []
    original = MAML.adapt_
    monkeypatch.setattr(
        MAML, "adapt_", lambda self, rows, **o: seen.append(rows.inputs.ids) or original(self, rows, **o)
    )
    given = ["--ckpt_path", str(tmp_path / "last.ckpt"), "--support", str(few), "--output", str(tmp_path / "out")]
    told = call(capsys, "adapt", *given, "--max_length", "5")
    if truncation in ("error", "drop"):
        assert told.code == 2 and "max_length" in told.err and not seen
        return
    assert told.code == 0
    tokenizer = lightning_ft.load(tmp_path / "last.ckpt").tokenizer
    word = "yes" if truncation == "keep_start" else "no"
    expected = tokenizer(f"{word} {word} {word}")["input_ids"]
    assert expected in seen[0].tolist()
    adapted = lightning_ft.load(tmp_path / "out" / "adapted.ckpt").eval()
    (cut,) = classify(adapted, [rows[0][0]], max_length=5, keep_end=truncation == "keep_end")
    (whole,) = classify(adapted, [f"{word} {word} {word}"])
    assert cut[1] == pytest.approx(whole[1], rel=1e-5)


def test_a_net_adapts_to_plain_tensors():
    """``(x, y)`` are the rows of an episode, and the loop is that of plain steps."""
    made, x = module(), torch.linspace(-1, 1, 5)[:, None]
    Attachment.of(made).rebuild([], seed=0)
    weights = made.adapt((x, x.sin()))
    net = mlp()
    for _ in range(2):
        slopes = torch.autograd.grad(((net(x) - x.sin()) ** 2).mean(), list(net.parameters()))
        with torch.no_grad():
            for p, slope in zip(net.parameters(), slopes, strict=True):
                p.sub_(0.1 * slope)
    for name, p in net.named_parameters():
        torch.testing.assert_close(weights[f"model.{name}"], p.detach())
    made.adapt_((x, x.sin()))
    assert all(torch.equal(p.detach(), weights[name]) for name, p in made.named_parameters())


def test_what_is_refused(job):
    with pytest.raises(Refusal, match="have 4 classes, and MAML has learned to tell 3 apart"):
        lightning_ft.adapt(job / "lora/last.ckpt", job / "4.jsonl", cache_dir=str(job / "cache"))


def test_a_net_is_told_of_the_way_by_hand(job, no_base):
    with pytest.raises(Refusal, match=r"last.ckpt was learned by a net.*module=MAML\(net.*module.adapt_\(\(x, y\)\)"):
        lightning_ft.adapt(job / "net/last.ckpt", job / "2.jsonl")


def test_what_is_refused_before_the_base_is_loaded(job, tmp_path, capsys, no_base):
    words_ = ["adapt", "--ckpt_path", str(job / "lora/last.ckpt"), "--output", str(tmp_path / "out"), "--support"]
    missing = call(capsys, *words_, str(tmp_path / "nothing.jsonl"))
    assert missing.code == 2 and "nothing.jsonl" in missing.err
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert call(capsys, *words_, str(tmp_path / "other.jsonl")).code == 2
    proto = ProtoNet(str(job / "bert"))
    saver = ModelCheckpoint(tmp_path / "proto", save_last=True, every_n_train_steps=1)
    fit(tmp_path, proto, words(job / "words.csv", job), saver, max_steps=1, enable_checkpointing=True)
    words_[2] = str(tmp_path / "proto/last.ckpt")
    other = call(capsys, *words_, str(job / "2.jsonl"))
    assert other.code == 2 and "was written by ProtoNet, which has no inner loop" in other.err


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_classifies_by_its_last_token(tmp_path, side):
    """Rows of unequal length and each alone are told the same, on whichever side the tokenizer pads."""
    made = SFT(str(write_base("llama", tmp_path / "llama")), task="sequence_classification", labels=["a", "b", "c"])
    Attachment.of(made).rebuild([], seed=0)
    made.eval()
    made.tokenizer.padding_side = side
    said = ["hello", "hello world you thank yes", "no no no no no no no no", "yes you"]
    with torch.no_grad():
        alone = [made.model(**made.tokenizer(text, return_tensors="pt")).logits[0].softmax(-1) for text in said]
    assert [p for _, p in classify(made, said)] == pytest.approx([float(line.max()) for line in alone], rel=1e-4)
    assert [label for label, _ in classify(made, said)] == ["abc"[int(line.argmax())] for line in alone]
    cut = list(classify(made, said, max_length=3))
    size = len(made.tokenizer("hello world you thank yes")["input_ids"])
    assert size > 3 and cut[1] != list(classify(made, said))[1]
