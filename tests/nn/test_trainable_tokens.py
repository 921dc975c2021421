"""Oracle: the whole table as one float64 tensor in which the rows were written, and autograd through all of it."""

import copy
import doctest

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import lightning_ft.nn.trainable_tokens as tokens_module
from lightning_ft.engine.optimizer import parameter_groups
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn.head import score_tokens
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import disabled, injected_layers
from lightning_ft.nn.trainable_tokens import EmbeddingRows, HeadRows, inject_token_rows, rows_by_table

SMALL = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=33)
TOKENS = [30, 2, 11]  # not in order
IDS = torch.tensor([[1, 2, 2, 11, 7], [30, 30, 5, 2, 0]])


class Net(nn.Module):
    """A table, something in between, a head; tied or not, with a bias or not."""

    def __init__(self, tied=True, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(33, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 33, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, ids):
        return torch.tanh(self.mix(self.embed(ids)))

    def forward(self, ids):
        return self.head(self.hidden(ids))


def llama(**config):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **config)).eval()


@torch.no_grad()
def train(net):
    generator = torch.Generator().manual_seed(4)
    for parameter in {p for layer in injected_layers(net).values() for p in layer.injected_parameters().values()}:
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32))


def with_rows(net, tokens=TOKENS):
    net.requires_grad_(False)
    layers = inject_token_rows(net, tokens)
    train(net)
    return layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_gradients_are_those_of_the_whole_table(tied, bias):
    net = Net(tied, bias).double()
    plain = copy.deepcopy(net).requires_grad_(True)
    layers = with_rows(net)
    assert set(layers) == ({"embed", "head"} if tied else {"embed"})
    rows = layers["embed"].token_rows
    order = sorted(TOKENS)
    with torch.no_grad():
        plain.embed.weight[order] = rows
    tolerance = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(IDS), plain(IDS), **tolerance)
    for each in (net, plain):
        each(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, plain.embed.weight.grad[order], **tolerance)
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["embed.token_rows"]
    with disabled(net):
        torch.testing.assert_close(net(IDS), Net(tied, bias).double()(IDS), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [None, True, False])
def test_the_rows_learn_through_the_chunked_head_too(recompute):
    net = Net().double()
    rows = with_rows(net)["embed"].token_rows
    labels = torch.tensor([2, 11, 30, 4, 2, 7, 30, 1, 0, 11])
    gradients = []
    for chunked in (True, False):
        net.zero_grad()
        hidden = net.hidden(IDS).flatten(0, 1)
        if chunked and recompute is False:  # without the head's gradient: hidden states only
            scores = score_tokens(hidden, labels, net.head, chunk_size=3, recompute=False)["logprob"]
        elif chunked:
            hint = list(net.head.parameters()) if recompute is None else ()
            scores = score_tokens(hidden, labels, net.head, parameters=hint, chunk_size=3, recompute=recompute)[
                "logprob"
            ]
        else:
            head = net.head
            logits = F.linear(hidden, head.merge_into(head.weight))
            if recompute is False:
                logits = F.linear(hidden, head.merge_into(head.weight).detach())
            scores = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        (scores * torch.arange(1.0, 11, dtype=torch.float64)).sum().backward()
        gradients.append((scores.detach(), rows.grad.clone()))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives():
    net = Net().double()
    layers = with_rows(net)

    def function(rows):
        return torch.func.functional_call(net, {"embed.token_rows": rows}, (IDS[:1],))

    rows = layers["embed"].token_rows.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (rows,))
    assert torch.autograd.gradgradcheck(function, (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_layer_is_the_identity_and_the_table_keeps_its_bytes(dtype):
    net = Net(bias=True).to(dtype)
    before, table = net(IDS), net.embed.weight.detach().clone()
    layers = inject_token_rows(net, TOKENS)
    assert layers["embed"].token_rows is layers["head"].token_rows and layers["embed"].token_rows.dtype == torch.float32
    assert torch.equal(net(IDS), before) and net(IDS).dtype == dtype
    train(net)
    out = net(IDS)
    assert out.dtype == dtype and not torch.equal(out, before)
    out.float().square().sum().backward()
    assert layers["embed"].token_rows.grad.dtype == torch.float32
    assert torch.equal(net.embed.base.weight, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(IDS).dtype == torch.bfloat16


def test_an_embedding_that_scales_its_rows_scales_the_trained_ones_as_well():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8)).eval()
    expected = copy.deepcopy(model)
    layers = with_rows(model)
    assert set(layers) == {"model.embed_tokens", "lm_head"}
    with torch.no_grad():
        expected.model.embed_tokens.weight[sorted(TOKENS)] = layers["lm_head"].token_rows
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_view_of_a_causal_model_scores_with_the_rows(tied):
    model = llama(tie_word_embeddings=tied)
    tokens = TOKENS if tied else {"lm_head": TOKENS}
    layers = with_rows(model, tokens)
    assert isinstance(layers["lm_head"], HeadRows) and (("model.embed_tokens" in layers) == tied)
    view = CausalLM(model)
    hidden = view.hidden(IDS)[0]
    labels = torch.tensor([2, 11, 30, 4, 5])
    expected = model(IDS).logits[0].log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(view.score(hidden, labels, chunk_size=2)["logprob"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_merging_writes_the_rows(tied):
    model = llama(tie_word_embeddings=tied)
    before = model.model.embed_tokens.weight.detach().clone()
    inject_lora(model, LoRAConfig(2, target=("q_proj",), trainable_tokens=tuple(TOKENS)))
    train(model)
    merged = merged_copy(model)
    assert not injected_layers(merged) and injected_layers(model)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    changed = (merged.model.embed_tokens.weight != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == sorted(TOKENS)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_lora_around_the_same_embedding_adds_to_the_rows():
    net = Net(tied=False)
    with_rows(net)
    alone = net(IDS)
    layer = inject_lora(net, LoRAConfig(2, target=("embed",), adapter_name="outer"))["embed"]
    assert torch.equal(net(IDS), alone) and isinstance(layer.base, EmbeddingRows)
    train(net)
    torch.testing.assert_close(net.embed(IDS), layer.base(IDS) + layer.delta()[IDS], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_copy(net)(IDS), net(IDS), rtol=1e-5, atol=1e-5)


def test_copies_keep_the_rows_tied():
    net = copy.deepcopy(Net())
    inject_token_rows(net, TOKENS)
    twin = copy.deepcopy(net)
    assert twin.embed.token_rows is twin.head.token_rows is not net.embed.token_rows
    assert [name for name, _ in net.named_parameters() if "rows" in name] == ["embed.token_rows"]


def test_weight_decay_leaves_the_rows_alone():
    net = Net()
    inject_lora(net, LoRAConfig(2, target=("mix",), trainable_tokens=tuple(TOKENS)))
    decays = {name: g["weight_decay"] for g in parameter_groups(net, lr=1.0, weight_decay=0.1) for name in g["names"]}
    assert decays == {"embed.token_rows": 0.0, "mix.lora_A": 0.1, "mix.lora_B": 0.1}


def test_which_table_is_meant():
    both = {"embed_tokens": [1, 2], "lm_head": [2, 3]}
    assert rows_by_table(llama(tie_word_embeddings=False), both) == {
        "model.embed_tokens": (1, 2),
        "lm_head": (2, 3),
    }
    assert rows_by_table(nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2)), [2, 0]) == {"1": (0, 2)}
    with pytest.raises(Refusal, match=r"cannot tell which table is meant: the model has 2 embeddings \(0, 1\)"):
        rows_by_table(nn.Sequential(nn.Embedding(3, 2), nn.Embedding(3, 2)), [1])


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([33], "'model.embed_tokens' has 33 tokens, 0 to 32, and no token 33"),
        ([4, 4], "name each token once, got 4 2 times"),
        ([-1], "whole numbers from 0 on, got -1"),
        ([True], "whole numbers from 0 on, got True"),
        ({"embed_tokens": []}, r"\['embed_tokens'\] must name at least one token"),
        ({"embed": [1]}, "'embed' matches nothing in this model; the nearest names are embed_tokens"),
        ({"q_proj": [1], "norm": [1]}, "rows of 'model.norm', a LlamaRMSNorm"),
        ({"lm_head": [1]}, "rows of 'lm_head' alone: its weight is tied to 'model.embed_tokens'"),
        ({"embed_tokens": [1], "lm_head": [2]}, "different ids, but they share one weight"),
        ({"embed_tokens": [1], "model.embed_tokens": [2]}, "names 'model.embed_tokens' twice"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_the_model_unchanged(tokens, message):
    model = llama(tie_word_embeddings=True)
    with pytest.raises(Refusal, match=message):
        inject_token_rows(model, tokens)
    assert not injected_layers(model)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(target=("embed_tokens",)), "cannot have both trainable_tokens and factors"),
        (dict(modules_to_save=("embed_tokens",)), "cannot have both trainable_tokens and full training"),
    ],
)
def test_a_table_learns_in_one_way_only(config, message):
    model = llama(tie_word_embeddings=False)
    with pytest.raises(Refusal, match=message):
        inject_lora(model, LoRAConfig(2, trainable_tokens=(1,), **config))
    assert not injected_layers(model)
    inject_lora(model, LoRAConfig(2, target=("embed_tokens",), adapter_name="first"))
    with pytest.raises(Refusal, match="'model.embed_tokens': it already carries the adapter 'first'"):
        inject_token_rows(model, [1])


def test_a_table_that_rewrites_itself_is_refused():
    with pytest.raises(Refusal, match="max_norm rewrites the frozen table"):
        inject_token_rows(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), [1])


def test_the_example_runs():
    assert doctest.testmod(tokens_module, extraglobs={"nn": nn}).failed == 0
