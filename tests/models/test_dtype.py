"""The dtype of each weight, for each policy and what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.dtype import apply_dtype_policy, compute_dtype
from lightning_ft.nn.master_weights import casts


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


IDS = torch.arange(12)[None]


def test_policies() -> None:
    """Names, and refusal of others."""
    assert compute_dtype("float32") == torch.float32
    assert compute_dtype("bfloat16") == compute_dtype("pure_bfloat16") == torch.bfloat16
    with pytest.raises(Refusal, match="choose one of auto"):
        compute_dtype("bf16")


@pytest.mark.parametrize("fast", [False, True])
def test_auto_asks_the_device(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """bfloat16 where the CPU has instructions for it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert compute_dtype("auto") == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_part_trained(start: torch.dtype, tied: bool) -> None:
    """Frozen weights low, trained ones float32 with a cast, rotary frequencies untouched; the model runs and trains."""
    model = llama(start, tied)
    model.requires_grad_(False)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    trained = {"model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"}
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    identities = {name: id(p) for name, p in model.named_parameters()}
    reference = model(IDS).logits.float()
    apply_dtype_policy(model, torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name in trained else torch.bfloat16), name
        assert id(p) == identities[name]
    assert model.model.rotary_emb.inv_freq.equal(frequencies)
    assert casts(model.model.norm) and not casts(model.model.layers[0].mlp.up_proj)
    assert casts(model.lm_head) == tied and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    out = model(IDS).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference, atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    apply_dtype_policy(model, torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and not any(casts(m) for m in model.modules())


def test_what_will_be_trained_is_float32_from_the_start() -> None:
    """A frozen weight that is thawed later is a master already."""
    model = llama()
    model.requires_grad_(False)
    apply_dtype_policy(model, torch.bfloat16, trainable=["model.norm.weight", "lm_head.weight"])
    assert model.model.norm.weight.dtype == torch.float32 and casts(model.model.norm)
    assert model.model.embed_tokens.weight.dtype == torch.float32, "the head's weight under its other name"
    model.model.norm.weight.requires_grad_(True)
    model(IDS).logits.float().sum().backward()
    assert model.model.norm.weight.grad.dtype == torch.float32


def test_everything_trained() -> None:
    """Full training stays float32 without casts, unless pure bfloat16 is asked for."""
    model = llama(torch.bfloat16)
    apply_dtype_policy(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not any(casts(m) for m in model.modules())
    apply_dtype_policy(model, torch.bfloat16, frozen_only=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(casts(m) for m in model.modules())


def test_modules_that_cast_themselves_and_integers_are_left_alone() -> None:
    """An injected layer's own factors and quantised codes keep their dtype; the base inside is cast."""

    class Injected(nn.Module):
        casts_itself = True

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.a = nn.Parameter(torch.zeros(2, 4))
            self.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
            self.register_buffer("seen", torch.zeros(()))

    net = nn.Sequential(Injected())
    apply_dtype_policy(net, torch.bfloat16)
    assert net[0].a.dtype == torch.float32 and net[0].codes.dtype == torch.uint8 and net[0].seen.dtype == torch.float32
    assert net[0].base.weight.dtype == torch.bfloat16 and type(net[0]) is Injected


def test_weights_that_must_stay_float32() -> None:
    """Where the architecture says so it is obeyed."""

    class Router(nn.Module):
        _keep_in_fp32_modules_strict = ["bias_of_choice"]

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 4)
            self.bias_of_choice = nn.Parameter(torch.zeros(4))

    net = Router().requires_grad_(False)
    apply_dtype_policy(net, torch.bfloat16)
    assert net.bias_of_choice.dtype == torch.float32 and net.gate.weight.dtype == torch.bfloat16
