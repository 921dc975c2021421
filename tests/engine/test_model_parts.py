"""Words for parts, and blocks, on models of several kinds."""

import pytest
import torch
from torch import nn

from lightning_ft.engine.freezing import parameters_named
from lightning_ft.engine.model_parts import stacks, top_blocks
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from tests.models.architectures import build, build_for


class Plain(nn.Module):
    """A convolutional net as users write it: a stem, stages in a list, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, bias=False)
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)) for _ in range(3))
        )
        self.fc = nn.Linear(2, 3)


def untied() -> nn.Module:
    """A T5 with a head of its own, as checkpoints of version 1.1 have."""
    model = build_for("t5", "seq2seq_lm")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


MODELS = {
    "llama": lambda: build("llama"),
    "llama_tied": lambda: build("llama_tied"),
    "gpt2": lambda: build("gpt2"),
    "bert": lambda: build_for("bert", "sequence_classification"),
    "roberta": lambda: build_for("roberta", "token_classification"),
    "t5": lambda: build_for("t5", "seq2seq_lm"),
    "t5_untied": untied,
    "bart": lambda: build_for("bart", "seq2seq_lm"),
    "plain": Plain,
}


def meant(model, word):
    """The tensors, by the name that the model itself lists them under."""
    chosen = {id(p) for p in parameters_named(model, word).values()}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


HEADS = {
    "llama": {"lm_head.weight"},
    "llama_tied": {"model.embed_tokens.weight"},  # one tensor with the head
    "gpt2": {"transformer.wte.weight"},
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {"classifier.weight", "classifier.bias"},
    "t5": {"shared.weight"},
    "t5_untied": {"lm_head.weight"},
    "bart": {"model.shared.weight"},
    "plain": {"fc.weight", "fc.bias"},
}
EMBEDDINGS = {
    "llama": {"model.embed_tokens.weight"},
    "llama_tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "bert": {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "roberta": {f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "t5": {"shared.weight"},
    "t5_untied": {"shared.weight"},
    "bart": {"model.shared.weight", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"},
}


@pytest.mark.parametrize("kind", HEADS)
def test_head(kind):
    assert meant(MODELS[kind](), "head") == HEADS[kind]


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings(kind):
    assert meant(MODELS[kind](), "embeddings") == EMBEDDINGS[kind]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "bart", "plain"])
def test_biases_are_all_of_them(kind):
    model = MODELS[kind]()
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert biases and meant(model, "biases") == biases


def test_bias_of_other_names():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "rnn": nn.LSTM(4, 3)})
    weights = {"attention.in_proj_weight", "attention.out_proj.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert meant(model, "biases") == {n for n, _ in model.named_parameters()} - weights


@pytest.mark.parametrize("kind", MODELS)
def test_norms_have_no_matrices(kind):
    model = MODELS[kind]()
    norms = meant(model, "norms")
    assert norms and all(p.ndim == 1 for n, p in model.named_parameters() if n in norms)
    # Whatever has one axis is a norm's or a bias.
    others = {n for n, p in model.named_parameters() if p.ndim == 1} - norms
    assert all(n.endswith("bias") for n in others)


@pytest.mark.parametrize(
    ("kind", "word", "words"),
    [
        ("llama", "biases", "LlamaForCausalLM has no biases, so training biases alone .BitFit. would train nothing"),
        ("plain", "embeddings", "Plain has no embeddings"),
    ],
)
def test_a_part_that_is_missing(kind, word, words):
    with pytest.raises(Refusal, match=words):
        parameters_named(MODELS[kind](), word)


def test_other_parts_that_are_missing():
    with pytest.raises(Refusal, match="no normalisation layers"):
        parameters_named(nn.Linear(2, 2), "norms")
    with pytest.raises(Refusal, match="BertModel has no head: it is a backbone alone"):
        parameters_named(build_for("bert", "sequence_classification").bert, "head")


def test_words_narrowed_by_layers():
    model = MODELS["gpt2"]()
    last = {n for n, _ in model.named_parameters() if n.startswith("transformer.h.1.")}
    chosen = set(parameters_named(model, ["biases", "head"], layers="-1:"))
    assert chosen == {n for n in last if n.endswith("bias")} | {"lm_head.weight"}
    with pytest.raises(Refusal, match="no norms inside layers"):
        parameters_named(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)), "norms", layers="0")


def test_words_mean_the_same_beside_lora():
    for kind in ("llama", "bert", "t5"):
        for word in ("head", "embeddings", "norms"):
            bare, model = MODELS[kind](), MODELS[kind]()
            inject_lora(model, LoRAConfig(r=2, target=("re:.*(word_embeddings|shared|lm_head|classifier|dense|o)",)))
            assert set(parameters_named(model, word)) == set(parameters_named(bare, word)), (kind, word)


STACKS = {
    "llama": [["model.layers.0", "model.layers.1"]],
    "gpt2": [["transformer.h.0", "transformer.h.1"]],
    "bert": [["bert.encoder.layer.0", "bert.encoder.layer.1"]],
    "t5": [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]],
    "bart": [
        ["model.encoder.layers.0", "model.encoder.layers.1"],
        ["model.decoder.layers.0", "model.decoder.layers.1"],
    ],
    "plain": [["stages.0", "stages.1", "stages.2"]],
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacks(kind):
    assert [[block.name for block in stack] for stack in stacks(MODELS[kind]())] == STACKS[kind]


def test_several_lists_are_one_stack():
    net = nn.Module()
    net.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    net.classifier = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    found = [[block.name for block in stack] for stack in stacks(net)]
    assert found == [["features.0", "features.2", "classifier.0", "classifier.2"]]


@pytest.mark.parametrize(
    ("blocks", "share", "expected"),
    [(30, 0.1, 3), (30, 0.25, 8), (30, 0.01, 1), (3, 1 / 3, 1), (4, 1.0, 4), (7, 0.5, 4), (10, 0.3, 3)],
)
def test_shares_round_up(blocks, share, expected):
    net = nn.ModuleList(nn.Linear(1, 1) for _ in range(blocks))
    assert [block.index for block in top_blocks(net, share)] == list(range(blocks - expected, blocks))


def test_a_share_of_each_stack():
    assert [b.name for b in top_blocks(MODELS["t5"](), 0.5)] == ["encoder.block.1", "decoder.block.1"]
    with pytest.raises(Refusal, match="Linear has no numbered blocks"):
        top_blocks(nn.Linear(1, 1), 0.5)
    assert torch.is_tensor(next(iter(parameters_named(MODELS["plain"](), "stages.2").values())))
