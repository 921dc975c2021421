"""Loading from folders, and one sentence for everything that cannot be loaded; the hub is never asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_ft.functional.errors import Refusal
from lightning_ft.models import load
from lightning_ft.nn import attention
from tests.models.architectures import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with a tokenizer that has no padding token."""
    where = tmp_path_factory.mktemp("models") / "tiny-llama"
    build("llama").bfloat16().save_pretrained(where)
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(where)
    return where


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "ask_hub", lambda repo, revision: "and the hub cannot be reached (ConnectError)")


@pytest.mark.parametrize(("asked", "given"), [("auto", attention.NAME), ("sdpa", "sdpa"), ("eager", "eager")])
def test_folder(folder: Path, asked: str, given: str) -> None:
    """The file's dtype, its weights, the attention asked for, and a padding token for rows."""
    model, tokenizer = load.load_causal(str(folder), attention=asked)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == given and not model.training
    assert model.lm_head.weight.equal(build("llama").bfloat16().lm_head.weight)
    assert tokenizer.pad_token == "<end>" and tokenizer("a b")["input_ids"] == [1, 2]
    assert load.load_config(str(folder)).model_type == "llama"


def test_architectures_outside_the_interface_get_their_own_attention(tmp_path: Path, folder: Path) -> None:
    """GPT-Neo knows no attention names; auto leaves it alone."""
    build("gpt_neo", None).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model, _ = load.load_causal(str(tmp_path))
    assert model.config._attn_implementation == "eager"


def test_nothing_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path names near ones; a hub id says what was tried; starters are always offered."""
    with pytest.raises(Refusal, match=r"no folder .*tiny-lama.*tiny-llama.*starter:smollm2-135m"):
        load.load_causal(str(folder.parent / "tiny-lama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(Refusal, match=r"nobody/nothing.*cannot be reached.*starter:smollm2-135m"):
        load.load_causal("nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(load, "ask_hub", lambda repo, revision: pytest.fail("the hub was asked"))
    with pytest.raises(Refusal, match=r"HF_HUB_OFFLINE forbids"):
        load.load_causal("nobody/nothing")


def test_a_cached_hub_model_asks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With configuration and weights in the cache no question goes out."""
    monkeypatch.setattr(load, "ask_hub", lambda repo, revision: pytest.fail("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name, revision=None: str(folder / name))
    assert load.resolve("some/model").local


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    """An empty folder and an adapter."""
    with pytest.raises(Refusal, match="without config.json"):
        load.load_causal(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match="holds an adapter"):
        load.load_causal(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (hf.BertConfig(architectures=["BertModel"]), "encoder.*sequence_classification"),
        (hf.T5Config(architectures=["T5ForConditionalGeneration"]), "sequence-to-sequence.*seq2seq_lm"),
        (hf.LlamaConfig(architectures=["LlamaForSequenceClassification"]), "another task"),
        (hf.ViTConfig(architectures=["ViTModel"]), "does not list"),
    ],
)
def test_other_kinds_name_the_task_that_fits(tmp_path: Path, config: Any, sentence: str) -> None:
    """Refused by the configuration, before weights are looked for."""
    config.save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=sentence):
        load.load_causal(str(tmp_path))


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """A file without the head does not get a random one."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="lack 1 tensors.*lm_head.weight"):
        load.load_causal(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="cannot be loaded"):
        load.load_causal(str(tmp_path))


def test_remote_code_needs_a_word(folder: Path, tmp_path: Path) -> None:
    """A repository with its own code is not run."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(model_type="own_kind", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(Refusal, match="set trust_remote_code"):
        load.load_causal(str(tmp_path))


def test_bad_settings_fail_before_anything_is_read() -> None:
    """Named, with the choices."""
    with pytest.raises(Refusal, match="choose one of auto, float32"):
        load.load_causal("nowhere", dtype_policy="fp8")
    with pytest.raises(Refusal, match="choose one of auto, lightning_ft"):
        load.load_causal("nowhere", attention="flash")


def test_fingerprint() -> None:
    """Equal for copies of one model in both dtypes and after a round trip; different for other weights or names."""
    low = build("llama").bfloat16()
    print_ = load.source_fingerprint(low)
    assert len(print_) == 64 and load.source_fingerprint(build("llama").bfloat16().float()) == print_
    with torch.no_grad():
        low.lm_head.weight[0, 0] += 1
    assert load.source_fingerprint(low) != print_
    assert load.source_fingerprint(build("llama").model) != print_


@pytest.mark.starter
def test_starter_model() -> None:
    """The starter model loads and says something sensible."""
    model, tokenizer = load.load_causal("starter:smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
