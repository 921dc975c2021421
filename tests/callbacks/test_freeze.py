"""Freeze: the contract, and what only it does."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_ft import Attachment, LoRA, Refusal
from lightning_ft.callbacks.freeze import Freeze
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, fit
from tests.models.architectures import build, build_for

CASE = Case(Freeze, small={"train": ["*.weight"]}, idle={"train": ["*"]})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def trained(*techniques):
    """Names that train in a tiny Llama of two blocks, from the model's root."""
    module = pl.LightningModule()
    module.model = build("llama")
    Attachment.of(module).rebuild(list(techniques), seed=0)
    return {name for name, p in module.model.named_parameters() if p.requires_grad}


ALL = {name for name, _ in build("llama").named_parameters()}
BLOCK_1 = {name for name in ALL if name.startswith("model.layers.1.")}
NORMS = {name for name in ALL if name.endswith("norm.weight")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"train": ["lm_head"]}, {"lm_head.weight"}),
        ({"train": ["lm_head.weight"]}, {"lm_head.weight"}),
        ({"train": ["model.norm", "lm_head"]}, {"model.norm.weight", "lm_head.weight"}),
        ({"train": ["*norm.weight"]}, NORMS),
        ({"train": ["*.mlp.*"]}, {name for name in ALL if ".mlp." in name}),
        ({"train": [r"re:.*\.[qv]_proj\.weight"]}, {n for n in ALL if "q_proj" in n or "v_proj" in n}),
        ({"train": ["*.layers.*"], "layers": "-1:"}, BLOCK_1),
        ({"train": ["*.layers.*"], "layers": [1]}, BLOCK_1),
        ({"train": ["mlp"], "layers": "1"}, {name for name in BLOCK_1 if ".mlp." in name}),
        ({"freeze": ["model.embed_tokens"]}, ALL - {"model.embed_tokens.weight"}),
        ({"freeze": ["*.layers.*"], "layers": "1"}, ALL - BLOCK_1),
        ({"train": ["*.layers.*"], "layers": "1", "freeze": ["mlp"]}, {n for n in BLOCK_1 if ".mlp." not in n}),
        ({"train": ["norms"]}, NORMS),
        ({"train": ["head"]}, {"lm_head.weight"}),
        ({"train": ["norms"], "layers": "-1:"}, NORMS & BLOCK_1),
        ({"top": 0.5}, BLOCK_1),
        ({"top": 0.1}, BLOCK_1),
        ({"top": 1.0}, {name for name in ALL if ".layers." in name}),
        ({"train": ["head"], "top": 0.5}, BLOCK_1 | {"lm_head.weight"}),
        ({"top": 0.5, "freeze": ["norms"]}, BLOCK_1 - NORMS),
        ({"freeze": ["embeddings"]}, ALL - {"model.embed_tokens.weight"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # a set has no order
)
def test_what_trains(arguments, expected):
    assert expected, "the expectation would prove nothing"
    assert trained(Freeze(**arguments)) == expected


def test_beside_lora_it_thaws():
    with_both = trained(LoRA(2), Freeze(["*norm.weight"]))
    factors = trained(LoRA(2))
    assert factors and all("lora_" in name for name in factors)
    assert with_both == factors | NORMS


def test_two_of_them_add_up():
    both = trained(Freeze(["lm_head"], name="a"), Freeze(["*norm.weight"], name="b"))
    assert both == {"lm_head.weight"} | NORMS
    assert trained(Freeze(["*norm.weight"], name="a"), Freeze(freeze=["model.norm"], name="b")) == NORMS - {
        "model.norm.weight"
    }


def test_the_frozen_stay_and_the_trained_move(tmp_path):
    net = PlainNet()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    fit(tmp_path, net, Freeze(["net.3"]))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("net.3."), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Freeze.train and Freeze.freeze are both empty"),
        ({"train": []}, "Freeze.train and Freeze.freeze are both empty"),
        ({"train": "lm_head"}, r"Freeze\.train must be .*, got 'lm_head'"),
    ],
)
def test_values_that_mean_nothing(arguments, words):
    with pytest.raises(Refusal, match=words):
        Freeze(**arguments)


@pytest.mark.parametrize("arguments", [{"train": ["lm_haed"]}, {"freeze": ["lm_haed"]}])
def test_a_name_without_a_match_names_the_nearest(arguments):
    with pytest.raises(Refusal, match=r"lm_haed.*lm_head"):
        trained(Freeze(**arguments))


def test_bitfit_trains_biases_and_the_head():
    module = pl.LightningModule()
    module.model = build_for("bert", "sequence_classification")
    Attachment.of(module).rebuild([Freeze(["biases", "head"])], seed=0)
    names = {name for name, p in module.model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in module.model.named_parameters()}
    assert names == {name for name in everything if name.endswith("bias")} | {"classifier.weight"}


def test_bitfit_on_a_model_without_biases():
    with pytest.raises(Refusal, match="LlamaForCausalLM has no biases.*train 'norms' instead, or use LoRA"):
        trained(Freeze(["biases"]))


def test_a_tied_head_is_the_embedding():
    module = pl.LightningModule()
    module.model = build("llama_tied")
    Attachment.of(module).rebuild([Freeze(["head"])], seed=0)
    assert module.model.get_input_embeddings().weight.requires_grad
    assert [n for n, p in module.model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_all_frozen_is_refused(tmp_path):
    with pytest.raises(Refusal, match="every parameter is frozen|Nothing is trainable"):
        fit(tmp_path, Careless(), Freeze(freeze=["*"]))


class Careless(PlainNet):
    """Gives the optimizer what does not train as well."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
