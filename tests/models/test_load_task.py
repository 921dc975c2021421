"""Heads of tasks on bases that have none, another one or the right one; everything else that is missing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_ft.formats.merged import export_merged
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.load_task import head_names, label_names, load_for_task
from lightning_ft.nn import attention
from lightning_ft.nn.lora import LoRAConfig, target_names
from tests.models.architectures import ENCODERS, build, build_for, task_config

ABC = ["a", "b", "c"]


def tokenizer_into(folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of bases as people have them: language models, bare encoders, one with a head."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    small = {"initializer_range": 0.02}
    made: dict[str, Any] = {
        "llama": build("llama").bfloat16(),
        "gpt2": build("gpt2"),
        "bert": hf.BertModel(hf.BertConfig(**{**ENCODERS["bert"]().to_dict(), **small})),
        "bert_lm": hf.BertForMaskedLM(ENCODERS["bert"]()),
        "roberta": hf.RobertaForMaskedLM(ENCODERS["roberta"]()),
        "distilbert": hf.DistilBertForMaskedLM(ENCODERS["distilbert"]()),
        "modernbert": hf.ModernBertForMaskedLM(ENCODERS["modernbert"]()),
        "t5": build_for("t5", "seq2seq_lm", None),
        "mamba": build("mamba", None),
    }
    named = task_config("bert", "sequence_classification")
    named.id2label = dict(enumerate(["bad", "good", "none"]))
    made["bert_head"] = build_for("bert", "sequence_classification", config=named)
    made["bert_numbered"] = build_for("bert", "sequence_classification")
    made["bert_tokens"] = build_for("bert", "token_classification")
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer_into(root / name)
    return {name: str(root / name) for name in made}


@pytest.mark.parametrize(
    ("name", "task", "new"),
    [
        ("llama", "sequence_classification", {"score.weight"}),
        ("gpt2", "token_classification", {"classifier.weight", "classifier.bias"}),
        ("bert", "regression", {"classifier.weight", "classifier.bias"}),
        ("bert_lm", "token_classification", {"classifier.weight", "classifier.bias"}),
        (
            "bert_lm",
            "sequence_classification",
            {f"{module}.{key}" for module in ("classifier", "bert.pooler.dense") for key in ("weight", "bias")},
        ),
        (
            "roberta",
            "sequence_classification",
            {f"classifier.{module}.{key}" for module in ("dense", "out_proj") for key in ("weight", "bias")},
        ),
        (
            "distilbert",
            "sequence_classification",
            {f"{module}.{key}" for module in ("pre_classifier", "classifier") for key in ("weight", "bias")},
        ),
        # its language-model head shares these names and is trained for something else
        (
            "modernbert",
            "token_classification",
            {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"},
        ),
    ],
)
def test_only_the_head_is_new(bases: dict[str, str], name: str, task: str, new: set[str]) -> None:
    """Its names are told; the file's values are kept; the same head comes back from any state of the global generator."""
    labels = None if task == "regression" else ABC
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model, tokenizer, names = load_for_task(task, bases[name], labels=labels, seed=3)
    assert names == new and not model.training and tokenizer.pad_token is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.isnan().any() for p in model.parameters())
    assert model.config._attn_implementation == attention.NAME
    torch.rand(5)
    again, _, _ = load_for_task(task, bases[name], labels=labels, seed=3)
    other, _, _ = load_for_task(task, bases[name], labels=labels, seed=4)
    for key, value in model.state_dict().items():
        assert value.equal(again.state_dict()[key])
        drawn = key in new and value.dim() > 1
        assert value.equal(other.state_dict()[key]) != drawn
    if labels is not None:
        assert label_names(model.config) == ABC and model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert admit_task(model, task, packing=False).layers == 2


def test_first_values_are_the_architectures(bases: dict[str, str]) -> None:
    """Normal with the configuration's width, zero biases, and in bfloat16 the rounded float32 ones."""
    model, _, _ = load_for_task("sequence_classification", bases["bert"], labels=[str(i) for i in range(200)])
    weight = model.classifier.weight.detach()
    assert 0.019 < float(weight.std()) < 0.021 and abs(float(weight.mean())) < 1e-3 and not model.classifier.bias.any()
    low, _, _ = load_for_task("sequence_classification", bases["llama"], labels=ABC)
    assert low.score.weight.dtype == torch.bfloat16 and 0.3 < float(low.score.weight.detach().float().std()) < 0.5


def test_a_new_head_is_no_reason_to_speak_of_tensor_parallelism(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers lists layers that were not sharded wherever its logger has a level of its own."""
    told: list[Any] = []
    monkeypatch.setattr("transformers.modeling_utils.verify_tp_plan", lambda *given: told.append(given))
    load_for_task("regression", bases["llama"])
    assert not told


def test_the_body_is_the_files(bases: dict[str, str]) -> None:
    """Every weight of the backbone."""
    stored = load_file(Path(bases["bert"]) / "model.safetensors")
    model, _, _ = load_for_task("token_classification", bases["bert"], labels=ABC)
    body = model.bert.state_dict()
    assert body and all(value.equal(stored[key]) for key, value in body.items())


def test_a_trained_head_is_kept_or_replaced(bases: dict[str, str]) -> None:
    """Kept for its own classes, named or not; replaced where the number, the names or the task are others."""
    stored = load_file(Path(bases["bert_head"]) / "model.safetensors")["classifier.weight"]
    for labels in (None, ["bad", "good", "none"]):
        model, _, new = load_for_task("sequence_classification", bases["bert_head"], labels=labels)
        assert not new and model.classifier.weight.equal(stored)
        assert label_names(model.config) == ["bad", "good", "none"]
    model, _, new = load_for_task("sequence_classification", bases["bert_numbered"], labels=ABC)
    assert not new and label_names(model.config) == ABC
    head = {"classifier.weight", "classifier.bias"}
    for task, name, labels in [
        ("sequence_classification", "bert_head", ["good", "bad", "none"]),
        ("sequence_classification", "bert_head", ["bad", "good"]),
        ("regression", "bert_head", None),
        ("token_classification", "bert_head", ["bad", "good", "none"]),
        ("sequence_classification", "bert_tokens", ABC),
    ]:
        model, _, new = load_for_task(task, bases[name], labels=labels)
        expected = head | ({"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if name == "bert_tokens" else set())
        assert new == expected, (task, name, labels)
        assert model.classifier.weight.shape[0] == model.config.num_labels == len(labels or [""])


@pytest.mark.parametrize(
    ("multi_label", "task", "problem"),
    [
        (True, "sequence_classification", "multi_label_classification"),
        (False, "sequence_classification", "single_label_classification"),
        (False, "regression", "regression"),
    ],
)
def test_the_kind_of_problem(bases: dict[str, str], multi_label: bool, task: str, problem: str) -> None:
    """Written where transformers' own head, and whoever loads the export, look for it."""
    labels = None if task == "regression" else ABC
    model, _, _ = load_for_task(task, bases["bert"], labels=labels, multi_label=multi_label)
    assert model.config.problem_type == problem and admit_task(model, task, packing=True).packing


def test_language_models(bases: dict[str, str]) -> None:
    """Sequence-to-sequence models with their whole file; causal ones as load_causal gives them."""
    model, _, new = load_for_task("seq2seq_lm", bases["t5"])
    assert not new and type(model).__name__ == "T5ForConditionalGeneration" and not model.training
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model, _, new = load_for_task("causal_lm", bases["llama"])
    assert not new and type(model).__name__ == "LlamaForCausalLM"


def test_a_new_pooler_is_no_target_of_all_linear(bases: dict[str, str]) -> None:
    """It is trained in full; one that the base has is adapted like the rest."""
    lora = LoRAConfig()
    new, _, _ = load_for_task("sequence_classification", bases["bert_lm"], labels=ABC)
    known, _, _ = load_for_task("sequence_classification", bases["bert"], labels=ABC)
    assert "bert.pooler.dense" in target_names(known, lora) and "bert.pooler.dense" not in target_names(new, lora)
    assert head_names(new) == {"classifier.weight", "classifier.bias"}


def test_the_export_loads_again(bases: dict[str, str], tmp_path: Path) -> None:
    """As a plain folder with its labels and the same logits, in transformers and here."""
    ids = torch.tensor([[5, 9, 4]])
    model, tokenizer, _ = load_for_task("sequence_classification", bases["bert_lm"], labels=ABC)
    export_merged(model, tokenizer, tmp_path / "bert")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    again, _, new = load_for_task("sequence_classification", str(tmp_path / "bert"))
    assert not new and label_names(again.config) == label_names(plain.config) == ABC
    for loaded in (plain, again):
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for kind in ("t5_v1_1", "bart"):
        writer = build_for(kind, "seq2seq_lm", None)
        export_merged(writer, tokenizer, tmp_path / kind)
        loaded, _, _ = load_for_task("seq2seq_lm", str(tmp_path / kind))
        expected = writer(input_ids=ids, labels=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids, labels=ids).logits, expected, rtol=1e-5, atol=1e-4)


def test_missing_weights_of_the_body_are_refused(bases: dict[str, str], tmp_path: Path) -> None:
    """Nothing but the head may be random, whatever the task."""
    for name, key, task, labels in [
        ("bert", "encoder.layer.1.output.dense.weight", "regression", None),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight", "seq2seq_lm", None),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        for path in Path(bases[name]).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        assert key in weights
        del weights[key]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(Refusal, match=f"lack 1 tensors.*{key}"):
            load_for_task(task, str(folder), labels=labels)


@pytest.mark.parametrize(
    ("task", "name", "more", "sentence"),
    [
        ("summarisation", "t5", {}, "is not known; choose one of causal_lm, seq2seq_lm"),
        ("seq2seq_lm", "bert", {}, "is an encoder .*sequence_classification"),
        ("seq2seq_lm", "llama", {}, "is a decoder .*causal_lm"),
        ("causal_lm", "bert", {}, "is an encoder"),
        ("sequence_classification", "t5", {"labels": ABC}, "sequence-to-sequence model .*seq2seq_lm"),
        ("regression", "t5", {}, "sequence-to-sequence model .*seq2seq_lm"),
        ("sequence_classification", "mamba", {"labels": ABC}, "transformers has no SequenceClassification"),
        ("sequence_classification", "bert", {}, "must be named: give labels"),
        ("token_classification", "bert_head", {}, "has no head for token_classification yet"),
        ("sequence_classification", "bert", {"labels": ["a", "a"]}, "different names"),
        ("sequence_classification", "bert", {"labels": "abc"}, "list of different names"),
        ("sequence_classification", "bert", {"labels": ["a"]}, "at least two"),
        ("regression", "bert", {"labels": ABC}, "has no classes"),
        ("token_classification", "bert", {"labels": ABC, "multi_label": True}, "multi_label belongs to"),
        ("regression", "bert", {"dtype_policy": "fp8"}, "choose one of auto, float32"),
        ("regression", "bert", {"attention": "flash"}, "choose one of auto, lightning_ft"),
    ],
)
def test_one_sentence_each(bases: dict[str, str], task: str, name: str, more: dict[str, Any], sentence: str) -> None:
    """The wrong base, the wrong labels, the wrong settings; before any weight is read."""
    with pytest.raises(Refusal, match=sentence):
        load_for_task(task, bases[name], **more)


@pytest.mark.starter
def test_starter_encoder() -> None:
    """The starter encoder has its pooler; its head is new."""
    model, tokenizer, new = load_for_task("sequence_classification", "starter:minilm-l6", labels=ABC)
    assert new == {"classifier.weight", "classifier.bias"}
    admission = admit_task(model, "sequence_classification", packing=True, tokenizer=tokenizer)
    assert admission.packing and admission.layers == 6
