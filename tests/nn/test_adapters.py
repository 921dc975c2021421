"""Several adapters on one base. Oracles: each adapter's own update times its weight, and PEFT's combination "cat"."""

import doctest

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lightning_ft.nn.adapters as adapters_module
from lightning_ft.formats.peft import export_peft, load_peft_
from lightning_ft.formats.peft_combined import export_combined
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.adapters import active_adapters, set_adapters
from lightning_ft.nn.ia3 import IA3Config, inject_ia3
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import disabled, injected_layers
from tests.tolerances import TOL

CLOSE = {"rtol": TOL[torch.float32], "atol": TOL[torch.float32]}
SIZE = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, vocab_size=64)
WEIGHTS = {"a": 0.7, "b": -0.3}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, initializer_range=0.1)).eval()


def logits(model):
    return model(input_ids=torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))).logits


@torch.no_grad()
def train(model):
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.4)


def two(**options):
    """Two trained adapters that overlap on q_proj, of different ranks and scales."""
    model = llama()
    inject_lora(model, LoRAConfig(2, alpha=6, target=("q_proj", "v_proj"), adapter_name="a", **options.get("a", {})))
    inject_lora(model, LoRAConfig(3, target=("q_proj", "down_proj", "embed_tokens"), rank_pattern={"down_proj": 4},
                                  rslora=True, adapter_name="b"))  # fmt: skip
    train(model)
    return model


def test_the_example():
    assert doctest.testmod(adapters_module).failed == 0


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "ia3"])
def test_a_weight_multiplies_the_update(kind):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    base = net(x)
    if kind == "ia3":
        inject_ia3(net, IA3Config(target=("0",), adapter_name="a"))
    else:
        options = {"dora": True} if kind == "dora" else {"init": kind} if kind == "pissa" else {}
        inject_lora(net, LoRAConfig(2, target=("0",), adapter_name="a", **options))
    train(net)
    full = net(x)
    assert (full - base).abs().max() > 1e-2
    for weight in (0.25, -1.5, 2.0, 0.0, 1.0):
        set_adapters(net, {"a": weight})
        torch.testing.assert_close(net(x), base + weight * (full - base), **CLOSE)
        torch.testing.assert_close(merged_copy(net)(x), net(x), **CLOSE)
        assert active_adapters(net) == {"a": weight}


def test_names_switch_and_what_is_not_named_is_off():
    model = two()
    both, bare = logits(model), logits(llama())
    alone = {}
    for name, other in (("a", "b"), ("b", "a")):
        with disabled(model, [other]):
            alone[name] = logits(model)
    for name, other in (("a", "b"), ("b", "a")):
        set_adapters(model, {name: 1.0})
        assert torch.equal(logits(model), alone[name]) and active_adapters(model) == {name: 1.0, other: 0.0}
    set_adapters(model, {})
    assert torch.equal(logits(model), bare)
    set_adapters(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(logits(model), both)
    assert all(p.requires_grad for x in injected_layers(model).values() for p in x.injected_parameters().values())


@pytest.mark.parametrize("start", [{}, {"a": {"init": "pissa"}}], ids=["plain", "pissa"])
def test_the_combination_is_one_adapter_in_peft(start, tmp_path):
    model = two(**start)
    set_adapters(model, WEIGHTS)
    expected = logits(model)
    export_combined(model, tmp_path / "both", WEIGHTS)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "both").eval()
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)
    torch.testing.assert_close(logits(merged_copy(model)), expected, **CLOSE)
    again = llama()
    layers = load_peft_(again, tmp_path / "both")
    torch.testing.assert_close(logits(again), expected, **CLOSE)
    rank = 2 * (2 if start else 1)
    assert layers["model.layers.0.self_attn.q_proj"].r == rank + 3 and layers["model.layers.0.mlp.down_proj"].r == 4


def test_the_combination_is_that_of_peft(tmp_path):
    model = llama()
    for name in "ab":
        inject_lora(model, LoRAConfig(2, alpha=5, target=("q_proj", "v_proj"), adapter_name=name))
    train(model)
    for name in "ab":
        export_peft(model, tmp_path / name, adapter_name=name)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a").eval()
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    positive = {"a": 0.7, "b": 0.3}
    theirs.add_weighted_adapter(list(positive), list(positive.values()), "both", combination_type="cat")
    theirs.set_adapter("both")
    set_adapters(model, positive)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    export_combined(model, tmp_path / "both", positive)
    ours = peft.PeftModel.from_pretrained(llama(), tmp_path / "both").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def test_convolutions_stand_side_by_side(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2))

    model, x = net(), torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    for name in "ab":
        inject_lora(model, LoRAConfig(2, target=("0",), adapter_name=name))
    train(model)
    set_adapters(model, WEIGHTS)
    export_combined(model, tmp_path / "both", WEIGHTS)
    again = net()
    load_peft_(again, tmp_path / "both")
    torch.testing.assert_close(again(x), model(x), **CLOSE)
    inject_lora(model, LoRAConfig(2, target=("1",), adapter_name="c"))
    with pytest.raises(Refusal, match="'1' is a convolution with groups"):
        export_combined(model, tmp_path / "c", {"c": 1.0})


def test_what_cannot_be_switched_or_combined_is_refused_and_nothing_changes(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZE)).eval()
    inject_lora(model, LoRAConfig(2, target=("query",), adapter_name="a"))
    inject_lora(model, LoRAConfig(2, target=("key",), adapter_name="dora", dora=True))
    inject_lora(model, LoRAConfig(2, target=("value",), adapter_name="head", modules_to_save=("classifier",)))
    inject_ia3(model, IA3Config(adapter_name="ia3"))
    inject_lora(model, LoRAConfig(2, target=("value",), adapter_name="rows", trainable_tokens=(3, 4)))
    before = active_adapters(model)
    on = dict.fromkeys(before, 1.0)
    for weights, words in (
        ({"c": 1.0}, "no adapter called 'c'; it carries: 'a', 'dora', 'head', 'ia3', 'rows'"),
        ({"a": float("nan")}, "must be a finite number, got nan"),
        ({"a": 1.0}, "'head' cannot have the weight 0: it trained classifier in full"),
        ({**on, "rows": 0.5}, "a layer of kind 'token_rows' is on .1. or off .0."),
    ):  # fmt: skip
        with pytest.raises(Refusal, match=words):
            set_adapters(model, weights)
    assert active_adapters(model) == before == on
    for name, words in (("dora", "no product of factors"), ("head", "also trained classifier"), ("rows", "also trained rows"),
                        ("ia3", "of kind 'ia3', not LoRA"), ("c", "no LoRA adapter called 'c'")):  # fmt: skip
        with pytest.raises(Refusal, match=words):
            model.classifier.requires_grad_(False)
            export_combined(model, tmp_path / "x", {"a": 0.5, name: 0.5})
    with pytest.raises(Refusal, match="every adapter has the weight 0"):
        export_combined(model, tmp_path / "x", {"a": 0.0})
    assert not (tmp_path / "x").exists()
