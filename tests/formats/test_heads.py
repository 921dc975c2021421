"""Oracle: PEFT and transformers. A head that is trained in full beside LoRA travels with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from lightning_ft.formats.heads import auto_class, task_type, trained_head
from lightning_ft.formats.merged import export_merged
from lightning_ft.formats.peft import export_peft, load_peft_
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.load_task import initialise
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from tests.models.architectures import build, build_for
from tests.models.task_rows import packed_ids

#: kind, task, PEFT's name of the task, the modules that must be stored whole
CASES: list[tuple[str, str, str, list[str]]] = [
    ("llama", "sequence_classification", "SEQ_CLS", ["score"]),
    ("llama", "token_classification", "TOKEN_CLS", ["score"]),
    ("gpt2", "regression", "SEQ_CLS", ["score"]),
    ("bert", "sequence_classification", "SEQ_CLS", ["classifier"]),
    ("bert_new_pooler", "sequence_classification", "SEQ_CLS", ["bert.pooler", "classifier"]),
    ("roberta", "sequence_classification", "SEQ_CLS", ["classifier"]),
    ("distilbert", "sequence_classification", "SEQ_CLS", ["pre_classifier", "classifier"]),
    ("modernbert", "token_classification", "TOKEN_CLS", ["head", "classifier"]),
    ("t5", "seq2seq_lm", "SEQ_2_SEQ_LM", []),
    ("marian", "seq2seq_lm", "SEQ_2_SEQ_LM", []),
    ("llama", "causal_lm", "CAUSAL_LM", []),
]


def base(kind: str, task: str, seed: int = 0) -> Any:
    """The same body each time, under a head that depends on the seed."""
    model = build_for(kind.removesuffix("_new_pooler"), task, None)
    if task not in ("seq2seq_lm", "causal_lm"):
        new = {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
        if kind.endswith("_new_pooler"):
            new |= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
        initialise(model, new, seed)
        model.fresh = new
    return model


def logits(model: Any) -> torch.Tensor:
    ids = packed_ids()[:, :9]
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


def trained(kind: str, task: str) -> Any:
    """LoRA with trained factors on every linear layer, and the new head thawed and trained in full."""
    model = base(kind, task)
    fresh = getattr(model, "fresh", set())
    inject_lora(model, LoRAConfig(r=2))
    with torch.no_grad():
        for number, (name, p) in enumerate(model.named_parameters()):
            p.requires_grad_(p.requires_grad or name in fresh)
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return model


@pytest.mark.parametrize(("kind", "task", "name", "saved"), CASES)
def test_adapter_and_head_in_peft(kind: str, task: str, name: str, saved: list[str], tmp_path: Path) -> None:
    """PEFT's logits on a base with another random head are ours; and ours again, when read back."""
    model = trained(kind, task)
    expected = logits(model)
    assert task_type(model) == name and trained_head(model) == saved
    export_peft(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == name and config["modules_to_save"] == (saved or None)
    other = base(kind, task, seed=5)
    assert (logits(other) - expected).abs().max() > 1e-2
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "a").eval()
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5 * scale)
    again = base(kind, task, seed=5)
    load_peft_(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5 * scale)
    assert trained_head(again) == saved
    export_peft(again, tmp_path / "b")  # a second time the head is among the adapter's own modules to save
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["modules_to_save"] == (saved or None)


@pytest.mark.parametrize(("kind", "task", "name", "saved"), [case for case in CASES if case[0] != "bert_new_pooler"])
def test_merged_folder_in_transformers(kind: str, task: str, name: str, saved: list[str], tmp_path: Path) -> None:
    """The Auto class that we name loads the folder and gives the same logits."""
    model = trained(kind, task)
    export_merged(model, None, tmp_path / "m")
    found, report = getattr(hf, auto_class(model)).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    expected = logits(model)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(logits(found.eval()), expected, rtol=1e-5, atol=2e-4 * scale)  # T5 enlarges rounding


def test_a_frozen_head_is_not_stored(tmp_path: Path) -> None:
    """Nor one of a language model; an adapter on a head that is trained in full as well is refused."""
    model = base("bert", "regression")
    inject_lora(model, LoRAConfig(r=2))
    assert trained_head(model) == [] and trained_head(build("llama")) == []
    model = base("bert", "regression")
    inject_lora(model, LoRAConfig(r=2, target=("classifier", "query")))
    assert trained_head(model) == []
    model.classifier.base.weight.requires_grad_(True)
    assert trained_head(model) == ["classifier"]
    with pytest.raises(Refusal, match="carries an adapter as well"):
        export_peft(model, tmp_path / "a")


def test_names_of_classes() -> None:
    """What a class's name does not say is not guessed."""
    assert auto_class(torch.nn.Linear(1, 1)) == "AutoModel" and task_type(torch.nn.Linear(1, 1)) is None
    assert task_type(build_for("bart", "seq2seq_lm", None)) == "SEQ_2_SEQ_LM"
    assert task_type(build_for("bart", "seq2seq_lm", None).model) is None
