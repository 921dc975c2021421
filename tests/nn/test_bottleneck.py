"""Oracle: the formula in float64; for whole models that nothing changes at the start, and that switching off restores it."""

import copy
import doctest
import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as hf
from torch import nn

import lightning_ft.nn.bottleneck as bottleneck_module
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn import attention
from lightning_ft.nn.bottleneck import BottleneckConfig, inject_bottleneck
from lightning_ft.nn.bottleneck_layers import StreamTap
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import disabled, injected_layers
from lightning_ft.nn.sublayers import sublayers
from tests.tolerances import TOL

SIZE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 33}
IDS = torch.tensor([[1, 2, 2, 11, 7], [30, 30, 5, 2, 3]])


def llama(**config):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, **config))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=33, n_positions=16))


def bert():
    return hf.BertForMaskedLM(hf.BertConfig(**SIZE))


def distilbert():
    return hf.DistilBertForMaskedLM(hf.DistilBertConfig(n_layers=2, dim=16, hidden_dim=24, n_heads=2, vocab_size=33))


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=33, decoder_start_token_id=0)
    )


class Encoder(nn.Module):
    """torch's own blocks, post-norm as they come or pre-norm."""

    def __init__(self, norm_first):
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 2, 24, 0.1, batch_first=True, norm_first=norm_first)
        self.embed = nn.Embedding(33, 16)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, ids):
        return self.encoder(self.embed(ids))


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "distilbert": distilbert,
    "t5": t5,
    "torch": lambda: Encoder(False),
    "torch norm first": lambda: Encoder(True),
}
STYLES = ("houlsby", "pfeiffer", "parallel")
PER_BLOCK = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def run(model, ids=IDS):
    if isinstance(model, hf.T5ForConditionalGeneration):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    out = model(ids)
    return getattr(out, "logits", out)


@torch.no_grad()
def train(model, scale=0.3):
    """Other values for everything that was injected."""
    generator = torch.Generator().manual_seed(4)
    for layer in injected_layers(model).values():
        for parameter in layer.injected_parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))


def test_the_example_in_the_docstring():
    assert doctest.testmod(bottleneck_module).failed == 0


OPTIONS = [
    {},
    {"non_linearity": "swish", "scale": 4.0},
    {"non_linearity": "gelu", "scale": "learned", "norm_before": True},
    {"non_linearity": "gelu_new", "scale": "channel", "norm_after": True},
    {"non_linearity": "tanh", "norm_before": True, "norm_after": True},
    {"non_linearity": "leakyrelu"},
]
FUNCTIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
}


def normed(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("style", ["houlsby", "parallel"])
def test_a_named_layer_computes_the_formula(style, options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    base = net(x)
    config = BottleneckConfig(style=style, target=("0",), reduction_factor=3, **options)
    (layer,) = inject_bottleneck(net, config).values()
    assert torch.equal(net(x), base)
    train(net)
    p = {name: value.double() for name, value in layer.injected_parameters().items()}
    read = x if style == "parallel" else base
    assert p["down_weight"].shape == (3, read.shape[-1]) and p["up_weight"].shape == (9, 3)
    if config.norm_before:
        read = normed(read, p["norm_before_weight"], p["norm_before_bias"])
    hidden = FUNCTIONS[config.non_linearity](read @ p["down_weight"].T + p["down_bias"])
    change = (hidden @ p["up_weight"].T + p["up_bias"]) * p.get("adapter_scale", config.scale)
    if config.norm_after:
        change = normed(change, p["norm_after_weight"], p["norm_after_bias"])
    torch.testing.assert_close(net(x), base + change, rtol=1e-12, atol=1e-12)
    assert {q.dtype for q in layer.injected_parameters().values()} == {torch.float32}


@pytest.mark.parametrize(("name", "style"), itertools.product(MODELS, STYLES))
def test_every_model_starts_as_it_was_and_each_adapter_acts(name, style):
    model = build(name).requires_grad_(False)  # attention has other kernels where nothing needs a gradient
    base = run(model)
    layers = inject_bottleneck(model, BottleneckConfig(style=style, reduction_factor=4))
    # torch's own attention is fused where nothing needs a gradient, and rounds otherwise then.
    near = TOL[torch.float32] if isinstance(model, Encoder) else 0.0
    torch.testing.assert_close(run(model), base, rtol=near, atol=near)
    expected = 2 * PER_BLOCK[style] + {"t5": 2 * PER_BLOCK[style] + (2 if style == "houlsby" else 0)}.get(name, 0)
    assert len(layers) == expected
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == len(layers) * (2 * 16 * 4 + 16 + 4), "2 D k + D + k for each adapter"
    train(model)
    changed = run(model)
    for layer in layers.values():  # every one of them has a say
        layer.enabled = False
        assert not torch.allclose(run(model), changed, atol=1e-5)
        layer.enabled = True
    with disabled(model, ["adapter"]):
        torch.testing.assert_close(run(model), base, rtol=near, atol=near)
    run(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert torch.equal(run(copy.deepcopy(model)), run(model))


@pytest.mark.parametrize("style", STYLES)
def test_checkpointing_changes_nothing(style):
    gradients = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inject_bottleneck(model, BottleneckConfig(style=style, reduction_factor=4))
        train(model)
        run(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@pytest.mark.parametrize(("name", "style"), itertools.product(["llama", "gpt2"], STYLES))
def test_generation_with_a_cache_is_the_argmax_of_whole_forwards(name, style):
    model = build(name)
    inject_bottleneck(model, BottleneckConfig(style=style, reduction_factor=4))
    train(model)
    made = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, run(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize("style", STYLES)
def test_an_encoder_decoder_generates_with_a_cache_what_it_does_without(style):
    model = build("t5")
    inject_bottleneck(model, BottleneckConfig(style=style, reduction_factor=4))
    train(model)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "output_logits": True}
    made, whole = (
        torch.stack(model.generate(IDS, use_cache=cached, return_dict_in_generate=True, **options).logits)
        for cached in (True, False)
    )
    torch.testing.assert_close(made, whole, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@pytest.mark.parametrize("style", STYLES)
def test_packed_segments_are_scored_as_rows_are(style):
    torch.manual_seed(0)
    attention.register()
    model = llama(attn_implementation=attention.NAME).eval()
    view = CausalLM(model)
    inject_bottleneck(model, BottleneckConfig(style=style, reduction_factor=4))
    train(model)
    rows = [torch.tensor([1, 2, 3, 4]), torch.tensor([7, 5, 6])]
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    together = view.hidden(packed, positions, bounds=[0, 4, 7])
    alone = torch.cat([view.hidden(row[None], torch.arange(len(row))[None]) for row in rows], 1)
    torch.testing.assert_close(together, alone, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@pytest.mark.parametrize("style", STYLES)
def test_a_bfloat16_base_keeps_its_dtype_and_the_adapter_float32(style):
    model = build("llama").bfloat16()
    layers = inject_bottleneck(model, BottleneckConfig(style=style, norm_before=True, scale="learned"))
    train(model)
    assert run(model).dtype == torch.bfloat16
    assert {p.dtype for x in layers.values() for p in x.injected_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("style", STYLES)
def test_on_the_meta_device_it_waits_there_for_its_values(style):
    with torch.device("meta"):
        model = bert()
    layers = inject_bottleneck(model, BottleneckConfig(style=style, init="houlsby"))
    assert all(p.is_meta for p in model.parameters())
    ready = inject_bottleneck(build("bert"), BottleneckConfig(style=style, init="houlsby"))
    model.to_empty(device="cpu")
    for layer, other in zip(layers.values(), ready.values(), strict=True):
        layer.reset_parameters()
        for name, parameter in other.injected_parameters().items():
            assert torch.equal(layer.injected_parameters()[name], parameter)


@pytest.mark.parametrize("style", STYLES)
def test_lora_changes_what_the_adapter_reads(style):
    """Both trained: the same as the adapter on a model into which the LoRA was merged."""
    model = build("llama")
    inject_lora(model, LoRAConfig(r=2))
    train(model)
    merged = merged_copy(model)
    for net in (model, merged):
        inject_bottleneck(net, BottleneckConfig(style=style, reduction_factor=4))
    trained = {n.replace(".base", ""): p for n, p in model.named_parameters() if isinstance(p, nn.Parameter)}
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
                trained[name.replace(".base", "")].copy_(parameter)
    torch.testing.assert_close(run(model), run(merged), rtol=TOL[torch.float32], atol=TOL[torch.float32])


def test_two_adapters_on_one_model():
    model = build("llama")
    inject_bottleneck(model, BottleneckConfig(style="parallel", adapter_name="a"))
    inject_bottleneck(model, BottleneckConfig(style="parallel", adapter_name="b"))
    train(model)
    both = run(model)
    with disabled(model, ["a"]):
        assert not torch.allclose(run(model), both)
    with pytest.raises(Refusal, match="already carries an adapter called 'a'"):
        inject_bottleneck(model, BottleneckConfig(adapter_name="a"))


def test_merging_is_refused_with_the_reason():
    model = build("llama")
    inject_bottleneck(model)
    with pytest.raises(Refusal, match=r"cannot be merged.*a function that is not linear stands between its matrices"):
        merged_copy(model)


def test_the_start_depends_on_the_seed_and_the_names_alone():
    nets = [build("llama") for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        torch.manual_seed(seed * 7)
        inject_bottleneck(net, BottleneckConfig(init="houlsby"), seed=seed)
    first, again, other = ([p for n, p in net.named_parameters() if n.endswith("down_weight")] for net in nets)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert 0 < first[0].abs().max() <= 0.02 and not torch.equal(first[0], first[1])


def test_convolutions_take_it_on_their_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    images = torch.randn(2, 3, 5, 5)
    base = net(images)
    layers = inject_bottleneck(net, BottleneckConfig(target=("0", "1"), reduction_factor=2))
    assert torch.equal(net(images), base)
    train(net)
    x = layers["0"].base(images)
    down, up = layers["0"].down_weight, layers["0"].up_weight
    hidden = F.conv2d(x, down[..., None, None], layers["0"].down_bias).relu()  # a 1 x 1 convolution
    expected = x + F.conv2d(hidden, up[..., None, None], layers["0"].up_bias)
    torch.testing.assert_close(layers["0"](images), expected, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    assert not torch.allclose(net(images), base)


def test_layers_places_and_factors_are_obeyed():
    model = build("t5")
    config = BottleneckConfig(
        style="houlsby", places=("attention", "cross_attention"), layers="-1:", reduction_factors={"1": 2.0}
    )
    layers = inject_bottleneck(model, config)
    assert list(layers) == [
        "encoder.block.1.layer.0.dropout",
        "decoder.block.1.layer.0.dropout",
        "decoder.block.1.layer.1.dropout",
    ]
    assert [layer.down_weight.shape[0] for layer in layers.values()] == [8, 1, 1]


def test_a_tap_keeps_nothing_after_the_forward():
    model = build("llama")
    inject_bottleneck(model, BottleneckConfig(style="parallel"))
    run(model)
    taps = [x for x in injected_layers(model).values() if isinstance(x, StreamTap)]
    assert len(taps) == 2 and all(tap.passage._stream is None for tap in taps)


def test_the_kinds_of_blocks_that_are_not_known_are_refused():
    torch.manual_seed(0)
    sandwich = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8))
    with pytest.raises(Refusal, match=r"sublayers of Gemma2ForCausalLM are not known.*name the modules.*by target"):
        inject_bottleneck(sandwich)
    before = run(sandwich.eval())
    assert len(inject_bottleneck(sandwich, BottleneckConfig(target=("mlp",)))) == 2
    assert torch.equal(run(sandwich), before)
    assert {place.kind for place in sublayers(build("bert"))} == {"attention", "feed_forward"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"style": "x"}, r"BottleneckConfig.style must be one of"),
        ({"reduction_factor": 0}, r"must be above 0, got 0"),
        ({"reduction_factors": {"a": 2.0}}, r"keyed by numbers of blocks"),
        ({"scale": "much"}, r"scale must be a number, 'learned' or 'channel', got 'much'"),
        ({"target": ("mlp",), "places": ("attention",)}, r"mean nothing beside it"),
        ({"places": ("cross_attention",)}, r"has no cross_attention to put an adapter at"),
        ({"reduction_factors": {"7": 2.0}}, r"names block 7, but the model has blocks 0 to 1"),
        ({"layers": "5"}, r"names no layer"),
        ({"target": ("mlpx",)}, r"mlp"),
        ({"target": ("act_fn",)}, r"BottleneckAdapter cannot wrap 'model.layers.0.mlp.act_fn', a SiLU"),
        ({"target": ("embed_tokens",), "style": "parallel"}, r"cannot wrap 'model.embed_tokens', a Embedding"),
    ],
)
def test_what_means_nothing_is_refused_and_leaves_the_model_alone(given, words):
    model = build("llama")
    with pytest.raises(Refusal, match=words):
        inject_bottleneck(model, BottleneckConfig(**given))
    assert not injected_layers(model) and all(p.requires_grad for p in model.parameters())
