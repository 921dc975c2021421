"""Packed layers against ordinary ones that hold what the packed weights stand for, and against transformers' own packing."""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models import quantize
from lightning_ft.models.dtype import apply_dtype_policy
from lightning_ft.models.quantize import dequantize_, describe, quantize_, try_packed
from lightning_ft.nn.lora import LoRAConfig, inject_lora, merged_copy
from lightning_ft.nn.packed import has_packed_weights, is_packed, packed_layers, without_hub_kernels
from lightning_ft.nn.registry import injected_layers
from tests.models.architectures import build, build_for

bnb = pytest.importorskip("bitsandbytes")
MODES = ("nf4", "nf4-dq", "fp4", "int8")
IDS = torch.arange(1, 13).reshape(2, 6)
KINDS = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "token_classification", "t5": "seq2seq_lm"}


def model_of(kind):
    return build_for(kind, KINDS[kind]) if kind != "llama" else build("llama")


def logits(model, kind):
    return model(input_ids=IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})).logits


def dense_by_hand(layer):
    """What a packed weight stands for, by bitsandbytes' own functions: (out, in)."""
    if layer.mode == "int8":
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.row_scale)
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def with_dense_weights(model, packed):
    """An ordinary copy of ``model`` whose weights are those that the packed ones stand for."""
    model = copy.deepcopy(model)
    for path, layer in packed_layers(packed).items():
        weight = model.get_submodule(path).weight
        dense = dense_by_hand(layer)
        weight.data = dense.t().contiguous() if type(model.get_submodule(path)).__name__ == "Conv1D" else dense
    return model


def stir(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in sorted(injected_layers(model).items()):
            for _, p in sorted(layer.injected_parameters().items()):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


def gradients(model, kind):
    model.zero_grad()
    logits(model, kind).float().log_softmax(-1)[..., 2].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "nf4") for kind in KINDS), *(("llama", m) for m in MODES[1:])])
def test_logits_and_gradients_are_those_of_the_weights_that_packed_ones_stand_for(kind, mode):
    plain = model_of(kind)
    packed = copy.deepcopy(plain)
    names = quantize_(packed, mode)
    assert set(names) == set(packed_layers(packed)) and len(names) >= 8
    ordinary = with_dense_weights(plain, packed)
    changed = (logits(packed, kind) - logits(plain, kind)).abs().max()
    for model in (packed, ordinary):
        inject_lora(model, LoRAConfig(r=2), seed=0)
        stir(model)
    ours, theirs = logits(packed, kind), logits(ordinary, kind)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert changed > 100 * (ours - theirs).abs().max()  # packing is far from nothing
    first, second = gradients(packed, kind), gradients(ordinary, kind)
    assert first.keys() == second.keys() and all("lora_" in name for name in first)
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-3, atol=1e-4 * float(second[name].abs().max()))


@pytest.mark.parametrize(("kind", "mode"), [("llama", "nf4"), ("llama", "nf4-dq"), ("llama", "int8"), ("gpt2", "nf4")])
def test_packed_as_transformers_packs(kind, mode, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = model_of(kind).to(torch.bfloat16)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": mode == "nf4-dq"}
    settings = BitsAndBytesConfig(**({"load_in_8bit": True} if mode == "int8" else four))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    names = quantize_(model, mode)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    assert names == [name for name, part in theirs.named_modules() if isinstance(part, kinds)]
    for name in names:
        ours, other = model.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(ours.weight.data, other.weight.data), name
        if mode == "int8":
            assert torch.equal(ours.row_scale, other.weight.SCB)
        else:
            assert torch.equal(ours.weight.quant_state.absmax, other.weight.quant_state.absmax)
            dense = bnb.functional.dequantize_4bit(other.weight, other.weight.quant_state)
            assert torch.equal(ours.dense(), dense.t() if kind == "gpt2" else dense)


def cosine(first, second):
    flat = [torch.cat([g[name].flatten() for name in sorted(first)]) for g in (first, second)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_after_an_evaluation_are_those_before_it(mode, dtype):
    """bitsandbytes' own forward repacks the weights in an evaluation on CPUs with AVX512-BF16; see the next test."""
    model = build("llama")
    quantize_(model, mode)
    assert not any(layer.support_avx512bf16_for_cpu for layer in packed_layers(model).values() if mode != "int8")
    inject_lora(model, LoRAConfig(r=2), seed=0)
    stir(model)
    apply_dtype_policy(model, dtype)
    codes = {name: p.detach().clone() for name, p in model.named_parameters() if is_packed(p)}
    before = gradients(model.train(), "llama")
    with torch.no_grad():
        logits(model.eval(), "llama")
        model.eval().generate(IDS, max_new_tokens=2, do_sample=False)
    after = gradients(model.train(), "llama")
    assert cosine(before, after) == pytest.approx(1.0, abs=1e-6)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters() if name in codes)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512-BF16")
def test_bitsandbytes_own_forward_has_the_trap():
    """What the test above guards against; the day this fails, upstream has mended it."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)

    def gradient():
        layer.train()
        return {"x": torch.autograd.grad(layer(x).float().square().sum(), x)[0].float()}

    before = gradient()
    with torch.no_grad():
        layer.eval()(x.detach())
    with contextlib.suppress(RuntimeError):  # or no gradient at all
        assert cosine(before, gradient()) < 0.9


def test_a_users_own_4_bit_layers_are_kept_from_repacking_too():
    import lightning.pytorch as pl

    from lightning_ft import Attachment, LoRA

    module = pl.LightningModule()
    module.net = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"), nn.Linear(64, 2))
    module.net[0].support_avx512bf16_for_cpu = True
    Attachment.of(module).rebuild([LoRA(2)], seed=0)
    assert not module.net[0].base.support_avx512bf16_for_cpu


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_trained_bias_stays_float32_and_learns(mode):
    """bitsandbytes casts a layer's bias in place to its input's dtype."""
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))
    quantize_(net, mode, skip=["1"])
    net.requires_grad_(False)
    bias = net[0].bias
    bias.requires_grad_(True)
    apply_dtype_policy(net, torch.bfloat16)
    out = net(torch.randn(3, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert bias.dtype == torch.float32 and net[0].bias is bias and bias.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
def test_moving_and_casting_the_model_leaves_codes_and_scales_alone(mode):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    quantize_(net, mode)
    before = [layer.dense() for layer in packed_layers(net).values()]
    copied = copy.deepcopy(net).to("cpu").to(torch.bfloat16)
    apply_dtype_policy(copied, torch.bfloat16)
    for layer, dense in zip(packed_layers(copied).values(), before, strict=True):
        assert torch.equal(layer.dense(), dense) and not layer.weight.requires_grad
        assert layer.weight.dtype == (torch.int8 if mode == "int8" else torch.uint8)
        assert (layer.row_scale if mode == "int8" else layer.weight.quant_state.absmax).dtype in (
            torch.float32, torch.uint8,
        )  # fmt: skip
    assert copied(torch.randn(2, 64, dtype=torch.bfloat16)).isfinite().all()


class Net(nn.Module):
    """Everything that is no matter for packing, and one layer that is."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 16)
        self.conv = nn.Conv1d(16, 16, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 9)
        self.tied = nn.Linear(16, 9)
        self.tied.weight = self.words.weight


def test_what_is_packed_and_what_is_not():
    net = Net()
    net.inner.eval()
    bias = net.inner.bias
    assert quantize_(net, "nf4", skip=["head"]) == ["inner"]
    assert net.inner.bias is bias and not net.inner.training
    assert {name for name, p in net.named_parameters() if is_packed(p)} == {"inner.weight"}
    assert describe(net) == "nf4: 256 numbers of one layer in 4.50 bits each"
    classifier = build_for("bert", "sequence_classification")
    names = quantize_(classifier, "nf4")
    assert not any(name.startswith("classifier") for name in names) and "bert.encoder.layer.0.output.dense" in names
    tied = build("llama_tied")
    assert "lm_head" not in quantize_(tied, "nf4")
    t5 = build_for("t5", "seq2seq_lm")
    assert not any(name.endswith("wo") for name in quantize_(t5, "nf4"))  # transformers looks at its dtype


def test_an_adapter_that_is_there_already_is_left_alone():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    inject_lora(net, LoRAConfig(r=2, target=("0",)))
    assert quantize_(net, "nf4", skip=["1"]) == ["0"]
    assert net[0].lora_A.dtype == torch.float32 and is_packed(net[0].base.weight)


def test_pytorchs_fused_block_gives_way():
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    ordinary = copy.deepcopy(block)
    packed = nn.TransformerEncoder(block, 1).eval()
    names = quantize_(packed, "nf4")
    assert names == ["layers.0.linear1", "layers.0.linear2"]
    for name in ("linear1", "linear2"):
        getattr(ordinary, name).weight.data = packed.get_submodule(f"layers.0.{name}").dense()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), ordinary(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_back_to_ordinary_layers(mode, kind):
    model = build(kind)
    before = {name: (type(part), tuple(part.weight.shape)) for name, part in model.named_modules() if "proj" in name}
    quantize_(model, mode)
    inject_lora(model, LoRAConfig(r=2))
    stir(model)
    expected = logits(model, kind).detach()
    with pytest.raises(Refusal, match="its base weight is packed"):
        merged_copy(model)
    dequantize_(model)
    assert not has_packed_weights(model)
    merged = merged_copy(model)
    after = {name: (type(part), tuple(part.weight.shape)) for name, part in merged.named_modules() if "proj" in name}
    assert after == before
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    low = build(kind).to(torch.bfloat16)
    quantize_(low, mode)
    dequantize_(low)
    assert all(p.dtype == torch.bfloat16 for p in low.parameters())


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_factors_that_begin_at_the_weight_begin_at_what_it_stands_for(mode, options):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48))
    packed = copy.deepcopy(plain)
    quantize_(packed, mode)
    dense = dense_by_hand(packed[0])
    ordinary = nn.Sequential(nn.Linear(64, 48))
    ordinary[0].weight.data, ordinary[0].bias.data = dense, plain[0].bias.data
    x = torch.randn(5, 64)
    start = packed(x)
    for net in (packed, ordinary):
        inject_lora(net, LoRAConfig(r=4, **options), seed=0)
    torch.testing.assert_close(packed(x), start, rtol=1e-5, atol=1e-5)
    for net in (packed, ordinary):
        stir(net)
    torch.testing.assert_close(packed(x), ordinary(x), rtol=1e-4, atol=1e-4)


def test_refusals(monkeypatch):
    with pytest.raises(Refusal, match="quantize 'nf3' is not known; choose one of nf4, nf4-dq, fp4, int8"):
        quantize_(nn.Linear(2, 2), "nf3")
    net = nn.Sequential(nn.Linear(64, 64))
    quantize_(net, "nf4")
    with pytest.raises(Refusal, match="packed already"):
        quantize_(net, "nf4")
    with pytest.raises(Refusal, match="has no linear layer that could be packed"):
        quantize_(nn.Sequential(nn.Conv2d(2, 2, 1)), "nf4")
    with pytest.raises(Refusal, match="'0' cannot be packed: its values are not loaded yet"):
        quantize_(nn.Sequential(nn.Linear(2, 2, device="meta")), "nf4")
    mamba = build("mamba", None)
    quantize_(mamba, "nf4")
    with pytest.raises(Refusal, match="MambaForCausalLM of 'it' cannot run on packed weights"):
        try_packed(mamba, "it")
    net = nn.Sequential(nn.Linear(64, 64))
    quantize_(net, "nf4")
    with pytest.raises(Refusal, match="modules_to_save cannot hold '0': its weight is packed"):
        inject_lora(nn.Sequential(net[0], nn.Linear(64, 2)), LoRAConfig(r=2, target=("1",), modules_to_save=("0",)))
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match="needs bitsandbytes, which is not installed"):
        quantize_(nn.Linear(2, 2), "nf4")


def test_no_kernel_is_fetched_from_the_hub(monkeypatch):
    """bitsandbytes asks the package ``kernels`` for compiled code of the hub while it is imported."""
    monkeypatch.setitem(sys.modules, "kernels", sys)
    with without_hub_kernels(), pytest.raises(ImportError):
        import kernels  # noqa: F401
    assert sys.modules["kernels"] is sys
