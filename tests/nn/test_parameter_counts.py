"""What each method trains, counted, is what its paper's formula says: on tiny models, and where a paper states a number."""

import pytest
import torch
import transformers as hf

from lightning_ft.engine.freezing import freeze_base, parameters_named, thaw
from lightning_ft.nn.bottleneck import BottleneckConfig, inject_bottleneck
from lightning_ft.nn.ia3 import IA3Config, inject_ia3
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.prefix import PrefixConfig, inject_prefix
from lightning_ft.nn.prompt import inject_prompt
from tests.models.architectures import build, build_for

# All four: two layers (T5: two in each stack), width 32; four heads of 8, in Llama with two key heads; feed-forward 48, in
# GPT-2 four widths.
L, D, F, KV = 2, 32, 48, 16
R, M, P, WIDE = 4, 8, 5, 12  # LoRA's rank, a bottleneck's width, a prefix's length, the width of its network

BUILD = {
    "llama": lambda: build("llama"),
    "bert": lambda: build_for("bert", "token_classification"),  # without a pooler, which is no part of a layer
    "gpt2": lambda: build("gpt2"),
    "t5": lambda: build_for("t5", "seq2seq_lm"),
}


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora(**options):
    return lambda model: inject_lora(model, LoRAConfig(R, **options))


def adapter(style, **options):
    return lambda model: inject_bottleneck(model, BottleneckConfig(style, reduction_factor=D / M, **options))


def bitfit(model):
    freeze_base(model)
    thaw(parameters_named(model, ["biases"]).values())


# Hu et al., 4.2: r (in + out) for each matrix W (out, in), which for a square one is 2 r d.
LINEAR = {
    "llama": L * (2 * (D + D) + 2 * (KV + D) + 3 * (F + D)),  # q, o; k, v; gate, up, down
    "bert": L * (4 * (D + D) + 2 * (F + D)),  # q, k, v, o; the two of the feed-forward
    "gpt2": L * ((3 * D + D) + (D + D) + 2 * (4 * D + D)),  # q, k, v in one; o; the two of the feed-forward
    "t5": L * (4 * (D + D) + 2 * (F + D)) + L * (8 * (D + D) + 2 * (F + D)),  # the decoder attends twice
}
OUTPUTS = {  # Liu et al., 2024 (DoRA), 4.1: and a magnitude for each output
    "llama": L * (2 * D + 2 * KV + 2 * F + D),
    "bert": L * (4 * D + F + D),
    "gpt2": L * (3 * D + D + 4 * D + D),
    "t5": L * (4 * D + F + D) + L * (8 * D + F + D),
}
QUERY_VALUE = {  # Hu et al., 5.1: queries and values alone, 2 r d each
    "llama": (["q_proj", "v_proj"], L * (R * (D + D) + R * (D + KV))),
    "bert": (["query", "value"], L * 2 * (2 * R * D)),
    "t5": (["q", "v"], (L + 2 * L) * 2 * (2 * R * D)),
}
BOTTLENECK = 2 * D * M + D + M  # Houlsby et al., 2.1: 2 m d + d + m, both biases counted
SUBLAYERS = {"llama": 2 * L, "bert": 2 * L, "gpt2": 2 * L, "t5": 2 * L + 3 * L}
BLOCKS = {"llama": L, "bert": L, "gpt2": L, "t5": 2 * L}
KEYS = {"llama": L * KV, "bert": L * D, "gpt2": L * D, "t5": 2 * L * D}  # of all self-attentions together
IA3 = {  # Liu et al., 2022, 3.3: d_k + d_v + d_ff for a layer, in a decoder with both attentions 2 (d_k + d_v) + d_ff
    "llama": ("auto", None, L * (KV + KV + F)),
    "bert": (["key", "value", "re:.*layer\\.\\d+\\.output\\.dense"], ["re:.*output\\.dense"], L * (D + D + F)),
    "gpt2": ("auto", None, L * (3 * D + 4 * D)),  # queries, keys and values are one layer, so all three are scaled
    "t5": ("auto", None, L * (D + D + F) + L * (2 * (D + D) + F)),
}
BITFIT = {  # Zaken et al., 3: q, k, v, o; the two of the feed-forward; both norms. Then the embedding's or the last norm
    "bert": L * (4 * D + (F + D) + 2 * D) + D,
    "gpt2": L * ((3 * D + D) + (4 * D + D) + 2 * D) + D,
}
TOKEN_HEAD = 3  # biases of the classifier of three classes, which is no part of the layers


def cases():
    for kind in BUILD:
        yield kind, "LoRA on all layers", lora(), R * LINEAR[kind]
        yield kind, "DoRA", lora(dora=True), R * LINEAR[kind] + OUTPUTS[kind]
        yield kind, "PiSSA has LoRA's", lora(init="pissa"), R * LINEAR[kind]
        yield kind, "Houlsby", adapter("houlsby"), SUBLAYERS[kind] * BOTTLENECK
        yield kind, "Pfeiffer", adapter("pfeiffer"), BLOCKS[kind] * BOTTLENECK
        yield kind, "parallel", adapter("parallel"), BLOCKS[kind] * BOTTLENECK
        yield kind, "a norm before", adapter("pfeiffer", norm_before=True), BLOCKS[kind] * (BOTTLENECK + 2 * D)
        yield kind, "a learned scale", adapter("parallel", scale="learned"), BLOCKS[kind] * (BOTTLENECK + 1)
        # Li and Liang, 4.2: P times the width of all activations, which are keys and values.
        yield kind, "prefix", lambda m: inject_prefix(m, PrefixConfig(P)), P * 2 * KEYS[kind]
        # 4.3: an embedding of P vectors and a network from it to all of them, here with one layer between.
        network = P * D + (D * WIDE + WIDE) + (WIDE * 2 * KEYS[kind] + 2 * KEYS[kind])
        yield kind, "prefix network", lambda m: inject_prefix(m, PrefixConfig(P, network=WIDE)), network
        yield kind, "prompt", lambda m: inject_prompt(m, P), P * D  # Lester et al., 2: P e
    for kind, (names, count) in QUERY_VALUE.items():
        yield kind, "LoRA on queries and values", lora(target=tuple(names)), count
    for kind, (target, inner, count) in IA3.items():
        config = IA3Config(
            target if isinstance(target, str) else tuple(target), None if inner is None else tuple(inner)
        )
        yield kind, "IA3", lambda m, config=config: inject_ia3(m, config), count
    for kind, count in BITFIT.items():
        yield kind, "BitFit", bitfit, count + (TOKEN_HEAD if kind == "bert" else 0)


@pytest.mark.parametrize(("kind", "edit", "count"), [pytest.param(k, e, c, id=f"{k}-{n}") for k, n, e, c in cases()])
def test_what_trains_is_what_the_formula_counts(kind, edit, count):
    model = BUILD[kind]()
    edit(model)
    assert trained(model) == count


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def roberta(layers, width):
    config = hf.RobertaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    return on_meta(hf.RobertaModel, config)


@pytest.mark.parametrize(
    ("layers", "width", "stated"), [(12, 768, 0.3e6), (24, 1024, 0.8e6)], ids=["roberta-base", "roberta-large"]
)
def test_hu_et_al_table_2(layers, width, stated):
    """LoRA of rank 8 on queries and values of RoBERTa: 0.3 and 0.8 million."""
    model = roberta(layers, width)
    inject_lora(model, LoRAConfig(8, target=("query", "value")))
    assert trained(model) == layers * 2 * (2 * 8 * width)
    assert round(trained(model), -5) == stated


def test_liu_et_al_count_of_t_few():
    """(IA)^3 on T0-3B, which has T5-XL's sizes: 540 thousand numbers."""
    config = hf.T5Config(
        d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu", vocab_size=128
    )
    model = on_meta(hf.T5ForConditionalGeneration, config)
    inject_ia3(model)
    assert trained(model) == 24 * (2048 + 2048 + 5120) + 24 * (2 * (2048 + 2048) + 5120) == 540_672


def test_lester_et_al_smallest_prompt():
    """Five tokens of T5-XXL's width, 4096: 20,480 numbers."""
    model = on_meta(hf.T5ForConditionalGeneration, hf.T5Config(d_model=4096, d_ff=64, num_layers=1, vocab_size=128))
    inject_prompt(model, 5, start="random")
    assert trained(model) == 20_480
