"""Oracles: torch.linalg's own decompositions, PEFT's gradients from the same start, and the base's function at the start."""

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_ft.formats.peft import export_peft, load_peft_, read_peft
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.lora_init import difference, factors_of_weight
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import injected_layers
from tests.tolerances import TOL

CLOSE = {"rtol": TOL[torch.float32], "atol": TOL[torch.float32]}
SIZE = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, vocab_size=64)
STARTS = ["pissa", "olora"]
start = pytest.mark.parametrize("init", STARTS)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, initializer_range=0.1)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.1, bos_token_id=1, eos_token_id=1)
    ).eval()


MODELS = {"llama": (llama, ("q_proj", "down_proj")), "gpt2": (gpt2, ("c_attn", "mlp.c_proj"))}
model = pytest.mark.parametrize(("make", "target"), MODELS.values(), ids=MODELS)


def ids():
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(module):
    return module(input_ids=ids()).logits


@torch.no_grad()
def train(module):
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_pissa_starts_at_the_largest_singular_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    a, b = factors_of_weight(weight, 3, 2.0, "pissa")
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(2 * (b @ a).double(), u[:, :3] @ torch.diag(s[:3]) @ vh[:3], **CLOSE)
    for factor in (a.T, b):  # columns are singular vectors, each of length sqrt(s / scale)
        torch.testing.assert_close((factor.T @ factor).double(), torch.diag(s[:3] / 2), **CLOSE)
    torch.testing.assert_close(torch.linalg.svdvals(weight - 2 * b @ a)[: min(shape) - 3].double(), s[3:], **CLOSE)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all(), "signs are fixed"
    flipped = factors_of_weight(-weight, 3, 2.0, "pissa")
    torch.testing.assert_close(flipped[1], b, **CLOSE)  # by the left vectors, whatever LAPACK returns
    torch.testing.assert_close(flipped[0], -a, **CLOSE)


def test_olora_starts_at_the_first_columns_of_q():
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    a, b = factors_of_weight(weight, 3, 2.0, "olora")
    torch.testing.assert_close(b.T @ b, torch.eye(3), **CLOSE)
    torch.testing.assert_close(b @ a[:, :3], weight[:, :3], **CLOSE)
    assert (a.diagonal() > 0).all() and torch.equal(a[:, :3].tril(-1), torch.zeros(3, 3))


def test_gaussian_is_as_peft_draws_it():
    layer = inject_lora(nn.Sequential(nn.Linear(400, 300)), LoRAConfig(16, target=("0",), init="gaussian"))["0"]
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.02) and not layer.lora_B.any()
    assert layer.lora_A0 is None


@start
@model
def test_the_start_is_the_base_to_the_bit_and_no_weight_changes(make, target, init):
    module = make()
    module.requires_grad_(False)
    before, weights = logits(module), {n: p.clone() for n, p in module.named_parameters()}
    layers = inject_lora(module, LoRAConfig(4, target=target, init=init))
    assert torch.equal(logits(module), before)
    assert all(layer.lora_B.abs().max() > 0.01 for layer in layers.values())
    train(module)
    assert (logits(module) - before).abs().max() > 1e-2
    kept = {n.replace(".base.", "."): p for n, p in module.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
    torch.testing.assert_close(logits(merged_copy(module)), logits(module), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"rank_pattern": {"down_proj": 2}}], ids=str)
@start
def test_the_difference_gives_the_same_logits_in_peft(init, options, tmp_path):
    module = llama()
    inject_lora(module, LoRAConfig(4, alpha=6, target=("q_proj", "down_proj"), init=init, **options))
    train(module)
    export_peft(module, tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(module), **CLOSE)
    stored, _ = read_peft(tmp_path)
    assert (stored.r, stored.init) == (8, "default")
    again = llama()
    load_peft_(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(module), **CLOSE)


@pytest.mark.parametrize(
    ("make", "target", "init"),
    # PEFT's OLoRA takes GPT-2's weights apart as they are stored, transposed, and fails in the forward.
    [(*MODELS[name], init) for name in MODELS for init in STARTS if (name, init) != ("gpt2", "olora")],
)
def test_gradients_are_those_of_peft_from_the_same_start(make, target, init):
    module = make()
    layers = inject_lora(module, LoRAConfig(4, alpha=8, target=target, init=init))
    options = dict(r=4, lora_alpha=8, target_modules=list(target), init_lora_weights=init)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**options, fan_in_fan_out=make is gpt2)).eval()
    torch.testing.assert_close(logits(theirs), logits(module), **CLOSE)
    for each in (module, theirs):
        logits(each).square().sum().backward()
    for name, layer in layers.items():
        other = theirs.base_model.model.get_submodule(name)
        a, b = (getattr(other, f"lora_{k}")["default"].weight for k in "AB")
        torch.testing.assert_close(layer.lora_A.abs(), a.abs(), rtol=1e-4, atol=1e-4)  # two LAPACKs' fp32
        # Pairs of vectors are given up to a sign, and so are the gradients.
        for mine, its in ((layer.lora_A, a), (layer.lora_B, b)):
            scale = its.grad.abs().max()
            torch.testing.assert_close(mine.grad.abs() / scale, its.grad.abs() / scale, rtol=1e-4, atol=1e-4)


def test_bf16_does_not_round_the_difference_away():
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * 3
    a0, b0 = factors_of_weight(weight, 8, 1.0, "pissa")
    step = [torch.randn(f.shape) * 1e-3 for f in (a0, b0)]
    a, b = a0 + step[0], b0 + step[1]
    x = torch.randn(16, 64)
    exact = x.double() @ (b.double() @ a.double() - b0.double() @ a0.double()).T
    down, up = difference(a, b, a0, b0)
    ours = (x.bfloat16() @ down.bfloat16().T) @ up.bfloat16().T
    naive = (x.bfloat16() @ a.bfloat16().T) @ b.bfloat16().T - (x.bfloat16() @ a0.bfloat16().T) @ b0.bfloat16().T
    size = exact.abs().max()
    assert (ours.double() - exact).abs().max() < TOL[torch.bfloat16] * size < (naive.double() - exact).abs().max()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: nn.Embedding(9, 4), {}, r"cannot start '0' with init 'pissa', .* it is a Embedding; exclude it"),
        (lambda: nn.Conv2d(3, 4, 3), {}, "it is a Conv2d"),
        (lambda: nn.Linear(3, 9), {"r": 4}, r"r = 4 on '0' is more than init 'pissa' can take from a matrix of 9 x 3"),
        (lambda: nn.Linear(3, 9, device="meta"), {}, "base's values are not loaded yet"),
    ],
)
def test_what_has_no_start_is_refused(make, options, words):
    net = nn.Sequential(make())
    with pytest.raises(Refusal, match=words):
        inject_lora(net, LoRAConfig(**{"r": 2, "target": ("0",), "init": "pissa", **options}))
    assert not injected_layers(net)
    with pytest.raises(Refusal, match="init must be default, gaussian, pissa or olora, got 'eva'"):
        LoRAConfig(init="eva")
