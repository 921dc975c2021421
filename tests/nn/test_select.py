import pytest
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.select import block_lists, layer_index, linear_names, select

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "mlp.up", "mlp.experts.0.up")]
NAMES += ["model.embed", "lm_head", "up"]


def of_layers(*indices):
    return [f"model.layers.{i}.attn.q_proj" for i in indices]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("model.layers.3.attn.q_proj", of_layers(3)),
        ("q_proj", of_layers(*range(12))),
        ("attn.q_proj", of_layers(*range(12))),
        ("model.layers.1.*q_proj", of_layers(1)),
        ("model.layers.?.attn.*", of_layers(*range(10))),
        ("model.layers.[02].attn.*", of_layers(0, 2)),
        (r"re:.*layers\.1\d?\.attn.*", of_layers(1, 10, 11)),
        (("lm_head", "model.layers.0.attn.q_proj"), [*of_layers(0), "lm_head"]),  # in the model's order
    ],
)
def test_pattern(pattern, expected):
    assert select(NAMES, pattern) == expected


def test_a_suffix_ends_at_a_dot_and_an_exact_name_is_also_a_suffix():
    assert select(["a.proj", "a.q_proj", "proj"], "proj") == ["a.proj", "proj"]


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("0-2,7", (0, 1, 2, 7)),
        ("-2:", (10, 11)),
        ("2:4", (2, 3)),
        (":2", (0, 1)),
        ("-1", (11,)),
        ([0, -1], (0, 11)),
        ((5,), (5,)),
    ],
)
def test_layers(layers, expected):
    assert select(NAMES, "q_proj", layers=layers) == of_layers(*expected)


def test_layers_count_in_the_outer_list_not_in_an_inner_one():
    # Experts lie inside layers; T5 has lists inside its blocks.
    assert select(NAMES, "experts.0.up", layers="3") == ["model.layers.3.mlp.experts.0.up"]
    blocks = [f"encoder.block.{i}" for i in range(3)] + [f"decoder.block.{i}" for i in range(5)]
    t5 = [f"{block}.layer.{j}.q" for block in blocks for j in (0, 1)]
    assert select(t5, "layer.0.q", layers="-1") == ["encoder.block.2.layer.0.q", "decoder.block.4.layer.0.q"]
    sizes = block_lists(t5)
    assert layer_index("decoder.block.4.layer.1.q", sizes) == ("decoder.block", 4)
    assert layer_index("shared", sizes) is None


def test_names_outside_numbered_blocks_are_left_out_by_layers():
    assert select(NAMES, "up", layers="0") == ["model.layers.0.mlp.up", "model.layers.0.mlp.experts.0.up"]


def test_exclude():
    chosen = select(NAMES, "*", exclude=("*.mlp.*", "embed", "up"), layers="0,1")
    assert chosen == of_layers(0, 1)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(patterns="q_prj"), "'q_prj' matches nothing in this model; the nearest names are q_proj"),
        (dict(patterns="atn.q_proj"), "the nearest names are attn.q_proj"),
        (dict(patterns=("q_proj", "nothing.*")), "'nothing.\\*' matches nothing"),
        (dict(patterns="q_proj", exclude=("k_proj",)), "'k_proj' matches nothing"),
        (dict(patterns="re:("), "not a regular expression"),
        (dict(patterns="q_proj", layers="12"), "'12' names no layer; the model has layers 0 to 11"),
        (dict(patterns="q_proj", layers="0-12"), "'0-12' names no layer"),
        (dict(patterns="q_proj", layers="first"), "'first' is not a layer; write '0-3,7'"),
        (dict(patterns="lm_head", layers="0"), "Nothing that 'lm_head' selects lies inside layers '0'"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(Refusal, match=message):
        select(NAMES, **kwargs)
    with pytest.raises(Refusal, match="no name holds a numbered block"):
        select(["a", "b"], "a", layers="0")


def test_all_linear_leaves_out_the_head_and_the_projection_that_is_read_not_called():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = dict(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)
    found = linear_names(LlamaForCausalLM(LlamaConfig(**small)))
    assert [name.split(".")[-1] for name in found] == [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=1))
    assert [name.split(".")[-2:] for name in linear_names(gpt2)] == [
        ["attn", "c_attn"], ["attn", "c_proj"], ["mlp", "c_fc"], ["mlp", "c_proj"]
    ]  # fmt: skip
    assert linear_names(nn.TransformerEncoderLayer(8, 2, 8)) == ["linear1", "linear2"]


def test_wrappers_are_seen_as_what_they_wrap():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    inject_lora(net, LoRAConfig(r=1))
    assert linear_names(net) == ["0", "2"]
