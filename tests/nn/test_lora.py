"""Oracles: the formulas again, with loops and in float64; PEFT itself is the oracle in tests/formats/test_peft.py."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import lightning_ft.nn.lora as lora_module
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, bias_parameters, inject_lora
from lightning_ft.nn.lora_layers import LoRALayer
from lightning_ft.nn.merging import merge_injected_, merged_copy
from lightning_ft.nn.registry import InjectedLayer, injected_layers
from tests.tolerances import TOL

SMALL = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=33)


class Scaled(nn.Embedding):
    """An embedding that scales its output in the forward, as Gemma's does."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


KINDS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: numbers(2, 3, 6)),
    "no_bias": (lambda: nn.Linear(6, 5, bias=False), lambda: numbers(6)),
    "conv1d": (lambda: Conv1D(5, 6), lambda: numbers(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([[0, 6, 3], [3, 3, 1]])),
    "scaled_embedding": (lambda: Scaled(7, 5), lambda: torch.tensor([[0, 6, 3], [3, 3, 1]])),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=(1, 2)), lambda: numbers(2, 3, 8, 7)),
    "unbatched_conv2d": (lambda: nn.Conv2d(3, 5, 3, padding="same"), lambda: numbers(3, 8, 7)),
}


def wrapped(make, trained=True, **config):
    torch.manual_seed(0)
    net = nn.Sequential(make())
    layer = inject_lora(net, LoRAConfig(**{"r": 2, "target": ("0",), **config}))["0"]
    if trained:
        fill(net)
    return net, layer


@torch.no_grad()
def fill(net):
    generator = torch.Generator().manual_seed(9)
    for layer in injected_layers(net).values():
        for parameter in layer.injected_parameters().values():
            parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=torch.float32))


def oracle_weight(layer):
    """The weight of eq. 3 (eq. 5 of DoRA), entry by entry in float64, as (out, in...)."""
    base = layer.base
    weight = base.weight.detach().double()
    transposed = isinstance(base, Conv1D | nn.Embedding)
    weight = (weight.t() if transposed else weight).clone()
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    r = a.shape[0]
    scale = layer.alpha / (math.sqrt(r) if layer.rslora else r)
    for o in range(weight.shape[0]):
        for k in range(r):
            weight[o] += scale * b[o, k].item() * a[k]
    if layer.lora_magnitude is not None:
        for o in range(weight.shape[0]):
            weight[o] *= layer.lora_magnitude[o].item() / weight[o].pow(2).sum().sqrt()
    return weight.t() if transposed else weight


@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 3.0}, {"dora": True}], ids=["", "rslora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_merge_equal_the_formula(kind, options):
    make, inputs = KINDS[kind]
    net, layer = wrapped(make, **options)
    x = inputs()
    oracle = make().double()
    oracle.load_state_dict({k: v.double() for k, v in layer.base.state_dict().items()})
    oracle.weight.data = oracle_weight(layer)
    expected = oracle(x.double() if x.is_floating_point() else x).float()
    tolerance = dict(rtol=TOL[torch.float32], atol=TOL[torch.float32])
    torch.testing.assert_close(net(x), expected, **tolerance)
    merged = merged_copy(net)
    assert not injected_layers(merged) and injected_layers(net)
    torch.testing.assert_close(merged[0].weight.double(), oracle.weight, **tolerance)
    torch.testing.assert_close(merged(x), expected, **tolerance)


def test_an_example_that_one_can_redo_by_hand():
    net, layer = wrapped(lambda: nn.Linear(2, 2, bias=False), trained=False, r=1, alpha=4)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[0.5], [-0.25]]))
    # A x = 1*3 + 2*1 = 5; s = 4/1; s B A x = (10, -5); W0 x = (3, 1)
    assert net(torch.tensor([3.0, 1.0])).tolist() == [13.0, -4.0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_is_the_identity_and_every_factor_can_learn(kind, dora):
    make, inputs = KINDS[kind]
    net, layer = wrapped(make, trained=False, dora=dora)
    assert layer.starts_as_identity
    assert torch.equal(net(inputs()), layer.base(inputs()))
    fill(net)
    net(inputs()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora" in name), name


def test_initial_values_depend_on_seed_and_name_only():
    def factors(seed=0, **config):
        torch.manual_seed(torch.seed() % 2**31)
        net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Embedding(3, 4))
        layers = inject_lora(net, LoRAConfig(r=2, **config), seed=seed)
        return {f"{n}.{k}": p.detach() for n, x in layers.items() for k, p in x.injected_parameters().items()}

    all_of_them = factors(target=("0", "1", "2"))
    assert torch.equal(all_of_them["1.lora_A"], factors(target=("1",))["1.lora_A"])
    assert torch.equal(all_of_them["2.lora_B"], factors(target=("2",))["2.lora_B"])
    assert not torch.equal(all_of_them["1.lora_A"], factors(seed=1, target=("1",))["1.lora_A"])
    assert not torch.equal(all_of_them["1.lora_A"], factors(adapter_name="other", target=("1",))["1.lora_A"])
    large = inject_lora(nn.Sequential(nn.Linear(400, 4)), LoRAConfig(r=64))["0"].lora_A
    assert large.abs().max() <= 1 / 20  # kaiming_uniform_(a=sqrt(5)) is U(+-1/sqrt(in))
    assert large.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_base_keeps_its_bytes_and_the_factors_are_fp32(kind, dora):
    make, inputs = KINDS[kind]
    net, layer = wrapped(lambda: make().bfloat16(), dora=dora, dropout=0.25)
    x = inputs()
    x = x.bfloat16() if x.is_floating_point() else x
    before = layer.base.weight.clone()
    out = net(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for parameter in layer.injected_parameters().values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert torch.equal(layer.base.weight, before)
    net.eval()
    wide = wrapped(lambda: make().bfloat16(), dora=dora)[0].float().eval()
    expected = wide(inputs())
    torch.testing.assert_close(net(x).float(), expected, rtol=0, atol=TOL[torch.bfloat16] * expected.abs().max().item())
    assert merged_copy(net)[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(kind, dora, base):
    make, inputs = KINDS[kind]
    net, layer = wrapped(lambda: make().to(base), dora=dora, dropout=0.5)
    x = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
        assert out.dtype == layer.base(x).dtype
        out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.injected_parameters().values())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_gradients_of_first_and_second_order(kind):
    make, inputs = KINDS[kind]
    net, layer = wrapped(make)
    net.double()
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    x = x[..., :4, :4] if x.dim() == 4 else x  # fewer entries to perturb

    def function(a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    factors = (layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(function, factors)
    assert torch.autograd.gradgradcheck(function, factors)


def test_outputs_are_no_views_and_work_under_vmap():
    net, _ = wrapped(lambda: nn.Linear(6, 5))
    x = numbers(2, 3, 6)
    assert not net(x)._is_view() and not net(x[0])._is_view()
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x))


def test_dropout_acts_on_the_low_rank_path_in_training_only():
    net, layer = wrapped(lambda: nn.Linear(6, 5), dropout=0.5)
    x = numbers(4, 6)
    torch.manual_seed(1)
    out = net.train()(x)
    torch.manual_seed(1)
    expected = layer.base(x) + F.linear(F.dropout(x, 0.5), layer.delta())
    torch.testing.assert_close(out, expected, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    torch.testing.assert_close(net.eval()(x), F.linear(x, layer.merge_into(layer.weight), layer.bias))


@pytest.mark.parametrize("inner_dora", [False, True])
def test_two_adapters_on_one_module_add_up_and_merge(inner_dora):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    x = numbers(3, 6)
    inner = inject_lora(net, LoRAConfig(r=2, adapter_name="a", dora=inner_dora))["0"]
    fill(net)
    first = net(x)
    outer = inject_lora(net, LoRAConfig(r=3, adapter_name="b"))["0"]
    assert net[0] is outer and outer.base is inner
    fill(net)
    assert inner.lora_A.requires_grad and outer.lora_A.requires_grad and not net[0].weight.requires_grad
    outer.enabled = False
    changed = net(x)
    assert not torch.equal(first, changed)
    outer.enabled = True
    torch.testing.assert_close(net(x), changed + F.linear(x, outer.delta()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_copy(net)(x), net(x), rtol=1e-5, atol=1e-5)
    inner.enabled = False  # what is switched off is not merged
    torch.testing.assert_close(merged_copy(net)(x), net(x), rtol=1e-5, atol=1e-5)


def test_only_factors_and_saved_modules_train():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    inject_lora(net, LoRAConfig(target=("0",), modules_to_save=("3",), adapter_name="a"))
    inject_lora(net, LoRAConfig(target=("2",), modules_to_save=("1",), adapter_name="b"))
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {
        "0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "1.weight", "1.bias", "3.weight", "3.bias"
    }  # fmt: skip
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_lora(other, LoRAConfig(target=("0",)), freeze_base=False)
    assert all(p.requires_grad for p in other.parameters())


BIASES = {
    "none": set(),
    "lora_only": {"0.base.bias"},
    "all": {"0.base.bias", "1.bias", "2.bias"},
}


@pytest.mark.parametrize("bias", BIASES)
def test_biases_train_beside_the_factors(bias):
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    config = LoRAConfig(target=("0",), modules_to_save=("3",), bias=bias)
    inject_lora(net, config)
    expected = {"0.lora_A", "0.lora_B", "3.weight", "3.bias"} | BIASES[bias]
    assert {name for name, p in net.named_parameters() if p.requires_grad} == expected
    assert {name.replace("0.", "0.base.") for name in bias_parameters(net, config)} == BIASES[bias]
    inject_lora(net, LoRAConfig(target=("2",), adapter_name="second"))
    assert {name.replace("2.base.", "2.") for name, p in net.named_parameters() if p.requires_grad} == (
        expected | {"2.lora_A", "2.lora_B"}
    )


def test_biases_that_are_not_there_or_are_taken_are_refused():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with pytest.raises(Refusal, match="bias='lora_only' trains nothing"):
        inject_lora(net, LoRAConfig(target=("0",), bias="lora_only"))
    inject_lora(net, LoRAConfig(target=("1",), bias="lora_only", adapter_name="first"))
    with pytest.raises(Refusal, match="'first' and 'default' both train the model's own biases"):
        inject_lora(net, LoRAConfig(target=("0",), bias="all"))
    assert len(injected_layers(net)) == 1


def test_the_layer_that_all_kinds_share_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        LoRALayer(nn.Linear(2, 2), r=1, alpha=1.0)


def test_saved_modules_and_what_lies_inside_excluded_ones_are_not_wrapped():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    config = LoRAConfig(modules_to_save=("layers.1.mlp",), exclude=("layers.0.self_attn",), layers="0,1")
    names = list(inject_lora(model, config))
    assert [n for n in names if "layers.0.self_attn" in n or "layers.1.mlp" in n] == []
    assert len(names) == 3 + 4


def test_rank_and_alpha_patterns():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    layers = inject_lora(
        model, LoRAConfig(r=4, alpha=8, rank_pattern={r"layers\.0\..*": 2, "q_proj": 3}, alpha_pattern={"up_proj": 1})
    )
    ranks = {name: (x.r, x.lora_A.shape[0], x.scale) for name, x in layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == (2, 2, 4.0)  # the first key that matches counts
    assert ranks["model.layers.1.self_attn.q_proj"] == (3, 3, 8 / 3)
    assert ranks["model.layers.1.mlp.up_proj"] == (4, 4, 0.25)


def test_pytorch_transformer_blocks_use_the_adapter_in_evaluation_too():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(block, 2)
    inject_lora(net, LoRAConfig(r=2))
    fill(net)
    x, padding = numbers(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    net.train()
    expected = net(x, src_key_padding_mask=padding)
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x, src_key_padding_mask=padding)[0], expected[0])
    with pytest.raises(Refusal, match="MultiheadAttention reads its weight without calling it"):
        inject_lora(nn.TransformerEncoderLayer(8, 2, 16), LoRAConfig(target=("out_proj",)))


def test_merging_a_tied_weight_is_refused_and_training_it_in_full_too():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    with pytest.raises(Refusal, match="tied .model.embed_tokens.weight = lm_head.weight"):
        inject_lora(model, LoRAConfig(modules_to_save=("lm_head",)))
    assert not injected_layers(model)
    inject_lora(model, LoRAConfig(target=("embed_tokens", "q_proj")))
    with pytest.raises(Refusal, match="'model.embed_tokens' cannot be merged: its weight is tied"):
        merge_injected_(model)
    assert len(injected_layers(model)) == 3


def test_grouped_convolutions_train_and_refuse_to_merge():
    net, layer = wrapped(lambda: nn.Conv2d(4, 6, 3, groups=2))
    assert net(numbers(1, 4, 5, 5)).shape == (1, 6, 3, 3)
    assert layer.lora_B.shape == (6, 1, 1, 1)
    with pytest.raises(Refusal, match="cannot be merged: the convolution has 2 groups"):
        merged_copy(net)
    with pytest.raises(Refusal, match="must be a multiple of the convolution's 2 groups"):
        wrapped(lambda: nn.Conv2d(4, 6, 3, groups=2), r=3)


@pytest.mark.parametrize("dora", [False, True])
def test_a_4_bit_base_trains_and_refuses_to_merge(dora):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(64, 64)
    packed = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(dense.state_dict())
    net = nn.Sequential(packed.to("cpu"))
    x = numbers(3, 64)
    before = net(x).detach()
    layer = inject_lora(net, LoRAConfig(r=2, dora=dora))["0"]
    assert layer.lora_A.shape == (2, 64)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    fill(net)
    out = net(x)
    out.sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0
    weight = layer.merge_into(bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float())
    torch.testing.assert_close(out, F.linear(x, weight, dense.bias), rtol=1e-4, atol=1e-3)
    with pytest.raises(Refusal, match="its base weight is packed"):
        merged_copy(net)


def test_merged_copy_refuses_other_adapters():
    class Other(InjectedLayer):
        kind = "bottleneck"

    with pytest.raises(Refusal, match="'0' carries the bottleneck adapter 'default'"):
        merged_copy(nn.Sequential(Other(nn.Linear(2, 2))))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(r=0), r"LoRAConfig.r must be a whole number of at least 1, got 0"),
        (dict(r=2.0), r"LoRAConfig.r must be a whole number"),
        (dict(alpha=0), "LoRAConfig.alpha must be above 0"),
        (dict(dropout=1.0), "LoRAConfig.dropout must be at least 0 and below 1"),
        (dict(target=()), "LoRAConfig.target is empty"),
        (dict(rank_pattern={"q": 0}), r"LoRAConfig.rank_pattern\['q'\] must be"),
        (dict(alpha_pattern={"(": 1.0}), "not a regular expression"),
        (dict(adapter_name="a.b"), "without dots"),
        (dict(bias="some"), "LoRAConfig.bias must be none, all or lora_only, got 'some'"),
        (dict(trainable_tokens=(1, 1)), "LoRAConfig.trainable_tokens must name each token once"),
        (dict(trainable_tokens={"e": (-1,)}), r"LoRAConfig.trainable_tokens\['e'\] must be token ids"),
    ],
)
def test_meaningless_configurations_are_refused(options, message):
    with pytest.raises(Refusal, match=message):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(target=("q_prjo",)), "'q_prjo' matches nothing .* nearest names are q_proj"),
        (dict(target=("self_attn",)), r"cannot wrap 'model.layers.0.self_attn', a MixtralAttention.*'\*self_attn.\*'"),
        (dict(target=("input_layernorm",)), "a MixtralRMSNorm: it wraps Linear"),
        (dict(target=("gate_up_proj",)), "one tensor of shape .* holds all experts"),
        (dict(target=("experts",)), "one tensor of shape .* holds all experts"),
        (
            dict(target=("*.experts.*",)),
            r"'model.layers.0.mlp.experts.gate_up_proj': it is one tensor of shape \(2, 48, 16\)",
        ),
        (dict(target=("re:.*mlp.experts.down_proj",)), "one tensor of shape .* holds all experts"),
        (dict(target=("w1",)), "one tensor of shape .* holds all experts"),
        (dict(target=("experts.0.w2",)), "one tensor of shape .* holds all experts"),
        (dict(target=("q_proj",), exclude=("q_proj",)), "nothing is left to wrap"),
        (dict(target=("q_proj",), exclude=("qproj",)), "'qproj' matches nothing"),
        (dict(target=("q_proj",), rank_pattern={"k_proj": 2}), "rank_pattern key 'k_proj' matches none"),
        (dict(target=("q_proj",), modules_to_save=("score",)), "'score' matches nothing"),
        (dict(target=("q_proj",), layers="7"), "the model has layers 0 to 1"),
    ],
)
def test_a_target_that_cannot_be_wrapped_is_refused_and_the_model_unchanged(options, message):
    model = MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2, bos_token_id=1, eos_token_id=1)
    )
    with pytest.raises(Refusal, match=message):
        inject_lora(model, LoRAConfig(**options))
    assert not injected_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_of_another_layout_are_refused_too_and_all_linear_goes_around_them():
    model = GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_key_value_heads=1))
    for target in ("experts", "gate_up_proj", "down_proj"):
        with pytest.raises(
            Refusal, match=r"layers.0.mlp.experts.* one tensor of shape .* holds all experts of a mixture"
        ):
            inject_lora(model, LoRAConfig(target=(target,)))
    assert {name.rpartition(".")[2] for name in inject_lora(model, LoRAConfig())} >= {"q_proj", "v_proj", "o_proj"}


def test_globs_pass_over_what_cannot_be_wrapped():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert len(inject_lora(model, LoRAConfig(target=("*.mlp.*",)))) == 6  # not the activation


def test_a_second_adapter_needs_another_name_and_dora_needs_a_bare_weight():
    net, _ = wrapped(lambda: nn.Linear(2, 2))
    with pytest.raises(Refusal, match="already carries an adapter called 'default'"):
        inject_lora(net, LoRAConfig())
    with pytest.raises(Refusal, match="DoRA cannot wrap '0', which already carries the adapter 'default'"):
        inject_lora(net, LoRAConfig(dora=True, adapter_name="second"))
    for other in (nn.Embedding(3, 2, max_norm=1.0), nn.Conv2d(1, 1, 1, padding_mode="circular")):
        with pytest.raises(Refusal, match="LoRA cannot wrap"):
            wrapped(lambda module=other: module)


def test_repr_shows_what_differs_and_the_example_runs():
    assert repr(LoRAConfig()) == "LoRAConfig()"
    assert repr(LoRAConfig(4, target=["q"])) == "LoRAConfig(r=4, target=('q',))"
    assert doctest.testmod(lora_module, extraglobs={"nn": nn}).failed == 0
