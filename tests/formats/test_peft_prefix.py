"""Oracle: PEFT itself. Logits are compared with trained, not first, values, both ways."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_ft.formats.peft import export_peft
from lightning_ft.formats.peft_prefix import load_peft_prefix_, read_prefix
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prefix import PrefixConfig, inject_prefix
from lightning_ft.nn.registry import injected_layers
from tests.models.architectures import V, build, build_for

P = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = {
    "llama": "causal_lm",
    "qwen3": "causal_lm",
    "gpt2": "causal_lm",
    "bert": "sequence_classification",
    "llama_classifier": "sequence_classification",
    "bert_tokens": "token_classification",
    "t5": "seq2seq_lm",
}
TYPES = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def base(kind):
    task = KINDS[kind]
    model = build(kind) if task == "causal_lm" else build_for(kind.partition("_")[0], task)
    model.config.pad_token_id = 0
    return model


def inputs(kind):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, V, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    more = {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def logits(model, kind):
    with torch.no_grad():
        out = model(**inputs(kind)).logits
    return out[:, :4] if KINDS[kind] in ("causal_lm", "token_classification") else out  # not of padding


def shake(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def ours(kind, **config):
    model = base(kind)
    parts = ("decoder",) if kind == "t5" else None
    inject_prefix(model, PrefixConfig(length=P, parts=parts, **config), seed=1)
    for name in ("classifier", "score"):
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)
    shake(p for p in model.parameters() if p.requires_grad)
    return model


@pytest.mark.parametrize("network", [None, 8], ids=["direct", "network"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_prefix_gives_the_same_logits_in_peft(kind, network, tmp_path):
    model = ours(kind, network=network)
    export_peft(model, tmp_path / "a", adapter_name="prefix")
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "a").eval()
    assert (logits(model, kind) - logits(base(kind), kind)).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs, kind), logits(model, kind), **CLOSE)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_peft_gives_the_same_logits_here_and_trains_on(kind, projection, tmp_path):
    config = peft.PrefixTuningConfig(
        task_type=TYPES[KINDS[kind]], num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=12
    )
    theirs = peft.get_peft_model(base(kind), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    model = base(kind)
    layers = load_peft_prefix_(model, tmp_path / "a")
    torch.testing.assert_close(logits(model, kind), logits(theirs, kind), **CLOSE)
    logits_with_gradient = model(**inputs(kind)).logits
    logits_with_gradient.square().mean().backward()
    assert all(layer.prefix_key.grad.abs().sum() > 0 for layer in layers.values())
    before = logits(model, kind)
    shake(p for p in model.parameters() if p.requires_grad)
    export_peft(model, tmp_path / "b", adapter_name="prefix")
    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "b").eval()
    assert (before - logits(model, kind)).abs().max() > 1e-3
    torch.testing.assert_close(logits(again, kind), logits(model, kind), **CLOSE)


def test_generation_in_peft_is_ours(tmp_path):
    model = ours("llama")
    export_peft(model, tmp_path / "a", adapter_name="prefix")
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a").eval()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = inputs("llama")["input_ids"]
    mask = torch.ones_like(ids)
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=mask, **options),
        theirs.generate(input_ids=ids, attention_mask=mask, **options),
    )


def test_golden_keys(tmp_path):
    export_peft(ours("llama"), tmp_path / "a", adapter_name="prefix")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"prompt_embeddings": (P, 2 * 2 * 16)}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    expected = {"num_virtual_tokens": P, "token_dim": 16, "num_attention_heads": 2, "num_layers": 2}
    assert expected.items() <= config.items() and config["peft_type"] == "PREFIX_TUNING"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: inject(build("mistral")), "has a window of 4 tokens, out of which PEFT lets a prefix slide"),
        (lambda: inject(build_for("t5", "seq2seq_lm")), "to a decoder's attention on itself alone"),
        (lambda: inject(build_for("albert", "sequence_classification")), "no block without"),
    ],
    ids=["window", "encoder", "shared"],
)
def test_what_peft_would_compute_otherwise_is_refused(model, words, tmp_path):
    with pytest.raises(Refusal, match=words):
        export_peft(model(), tmp_path / "a", adapter_name="prefix")


def inject(model):
    inject_prefix(model)
    return model


def test_another_base_is_refused_and_left_as_it_was(tmp_path):
    export_peft(ours("llama"), tmp_path / "a", adapter_name="prefix")
    model = base("gpt2")
    with pytest.raises(Refusal, match="was trained on another base: its prefix has 2 layers of 2 heads of 8"):
        load_peft_prefix_(model, tmp_path / "a")
    assert not injected_layers(model) and all(p.requires_grad for p in model.parameters())


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    folder = tmp_path / "a"
    export_peft(ours("llama"), folder, adapter_name="prefix")
    save_file({"prompt_embeddings": torch.zeros(3, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(Refusal, match="its table is \\(3, 4\\)"):
        read_prefix(folder)
    save_file({"other": torch.zeros(3, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(Refusal, match="lacks a table 'prompt_embeddings'"):
        read_prefix(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(Refusal, match="of type LORA, not PREFIX_TUNING"):
        read_prefix(folder)
