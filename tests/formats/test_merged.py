"""Oracle: the merged folder, loaded by transformers alone, gives the logits of the adapted model."""

import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_ft.formats.atomic import atomic_folder
from lightning_ft.formats.merged import export_merged
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.registry import injected_layers
from tests.tolerances import TOL

IDS = torch.arange(1, 13)[None]


def adapted(dtype=torch.float32, **config):
    torch.manual_seed(0)
    small = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=33)
    model = LlamaForCausalLM(LlamaConfig(**small)).to(dtype).eval()
    inject_lora(model, LoRAConfig(r=2, **config))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


class Tokenizer:
    def save_pretrained(self, save_directory):
        with open(f"{save_directory}/tokenizer.json", "w") as file:
            file.write("{}")


@pytest.mark.parametrize("config", [{}, {"dora": True}, {"target": ("embed_tokens", "lm_head", "down_proj")}])
def test_logits_are_equal_and_the_model_is_not_touched(config, tmp_path):
    model = adapted(**config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model(IDS).logits
    assert export_merged(model, Tokenizer(), tmp_path / "m") == tmp_path / "m"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    assert injected_layers(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("base, stored", [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_dtype(base, stored, tmp_path):
    model = adapted(base)
    layer = model.model.layers[1].mlp.up_proj
    rounded = (layer.weight.float() + layer.delta()).to(torch.bfloat16)
    export_merged(model, None, tmp_path / "m", stored)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, rounded)  # merged in fp32, rounded once
    expected = model.float()(IDS).logits
    difference = (loaded.float()(IDS).logits - expected).abs().max()
    assert difference < TOL[torch.bfloat16] * expected.abs().max()


def test_refusals_leave_the_disk_as_it_was(tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="needs a Hugging Face model, got Linear"):
        export_merged(nn.Linear(1, 1), None, tmp_path / "m")
    model = adapted()
    model.lm_head.weight = model.model.embed_tokens.weight
    inject_lora(model, LoRAConfig(target=("lm_head",), adapter_name="head"))
    with pytest.raises(Refusal, match="its weight is tied"):
        export_merged(model, None, tmp_path / "m")
    model = adapted()
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
        with pytest.raises(Refusal, match="needs 0.0. GB and the disk has 0.00 GB left"):
            export_merged(model, None, tmp_path / "m")
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(Refusal, match="'model.norm.weight' is stored quantised"):
        export_merged(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Refusal, match="is a file"):
        export_merged(adapted(), None, tmp_path / "file")


def test_a_failed_write_keeps_the_earlier_folder(tmp_path):
    target = tmp_path / "a" / "m"
    with atomic_folder(target, marker="config.json") as folder:
        (folder / "config.json").write_text("first")
        (folder / "inner").mkdir()
        (folder / "inner" / "part").write_text("x")
    with pytest.raises(OSError, match="disk"), atomic_folder(target, marker="config.json") as folder:
        (folder / "config.json").write_text("half")
        raise OSError("disk")
    assert (target / "config.json").read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["m"]
    with atomic_folder(target, marker="config.json") as folder:
        (folder / "config.json").write_text("second")
    assert [p.name for p in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["m"]
