"""Oracle: the formula by hand and in float64; PEFT is the oracle in tests/formats/test_peft_ia3.py."""

import doctest

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_ft.nn.ia3 as ia3_module
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.ia3 import IA3Config, inject_ia3
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import injected_layers
from tests.tolerances import TOL

CLOSE = {"rtol": TOL[torch.float32], "atol": TOL[torch.float32]}


def test_the_example():
    assert doctest.testmod(ia3_module).failed == 0


@pytest.mark.parametrize(("feedforward", "expected"), [((), [24.0, -4.0]), (("0",), [-1.0, 6.0])])
def test_an_example_that_one_can_redo_by_hand(feedforward, expected):
    net = nn.Sequential(nn.Linear(2, 2))
    layer = inject_ia3(net, IA3Config(target=("0",), feedforward=feedforward))["0"]
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -2.0]]))
        layer.base.bias.copy_(torch.tensor([1.0, -2.0]))
        layer.ia3_scale.copy_(torch.tensor([2.0, -1.0] if feedforward else [2.0, 0.4]))
    # x = (3, 4): W x + b = (12, -10), scaled (24, -4). With the input scaled: (6, -4), W x + b = (6 - 8 + 1, 8 - 2).
    torch.testing.assert_close(net(torch.tensor([3.0, 4.0])), torch.tensor(expected))


@pytest.mark.parametrize("order", [("lora", "ia3"), ("ia3", "lora"), ("lora", "ia3", "lora2"), ("dora", "ia3")])
@pytest.mark.parametrize("feedforward", [(), ("0",)])
def test_nested_with_lora_in_any_order_the_merge_is_what_both_do(order, feedforward):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    for name in order:
        if name == "ia3":
            inject_ia3(net, IA3Config(target=("0",), feedforward=feedforward, adapter_name=name))
        else:
            inject_lora(net, LoRAConfig(2, target=("0",), dora=name == "dora", adapter_name=name))
    with torch.no_grad():
        for layer in injected_layers(net).values():
            for parameter in layer.injected_parameters().values():
                parameter.add_(torch.rand_like(parameter))
    merged = merged_copy(net)
    torch.testing.assert_close(merged(x), net(x), **CLOSE)
    assert type(merged[0]) is nn.Linear


def test_one_layer_of_llama_in_float64():
    """Keys, values and inner activations scaled in the paper's places: the same as a model with scaled weights."""
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2, vocab_size=33)
    model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.2)).double().eval()
    oracle = LlamaForCausalLM(LlamaConfig(**size)).double().eval()
    oracle.load_state_dict(model.state_dict())
    layers = inject_ia3(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.ia3_scale.uniform_(0.5, 2.0)
        block = oracle.model.layers[0]
        for name in ("k", "v"):
            scale = layers[f"model.layers.0.self_attn.{name}_proj"].ia3_scale.double()
            getattr(block.self_attn, f"{name}_proj").weight.mul_(scale[:, None])
        block.mlp.down_proj.weight.mul_(layers["model.layers.0.mlp.down_proj"].ia3_scale.double())
    ids = torch.randint(33, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 + 16 + 24, "d_k + d_v + d_ff"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": ()}, "IA3Config.target is empty"),
        ({"feedforward": ("fc",)}, "with target 'auto' leave it out"),
        ({"adapter_name": "a.b"}, "must be a word without dots"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, words):
    with pytest.raises(Refusal, match=words):
        IA3Config(**options)


def test_a_second_adapter_needs_another_name():
    net = nn.Sequential(nn.Linear(2, 2))
    inject_ia3(net, IA3Config(target=("0",)))
    with pytest.raises(Refusal, match="already carries an adapter called 'ia3'"):
        inject_ia3(net, IA3Config(target=("0",)))
