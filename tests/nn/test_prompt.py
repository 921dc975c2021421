"""Soft prompts, against the same model fed with embeddings that begin with the prompt."""

import copy

import pytest
import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.models.classifier import Classifier
from lightning_ft.models.seq2seq import Seq2SeqLM
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.prompt import inject_prompt
from lightning_ft.nn.registry import disabled, replace_module
from tests.models.architectures import V, build, build_for
from tests.tolerances import TOL

P = 3
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
SHORT = 5  # tokens of the second row
MASK = torch.ones(2, 7, dtype=torch.bool)
MASK[1, SHORT:] = False


def prompted(model, seed=2):
    """The layer, with values as large as the embeddings'."""
    layer = inject_prompt(model, P)
    scale = model.get_input_embeddings()(IDS).std()
    with torch.no_grad():
        layer.prompt.copy_(torch.randn(layer.prompt.shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return layer


def fed(model, layer, ids, **more):
    """What the model gives for embeddings that begin with the prompt: PEFT's way, written out."""
    with disabled(model):
        own = model.get_input_embeddings()(ids)
        return model(inputs_embeds=torch.cat([layer.prompt.expand(len(ids), -1, -1), own], 1), **more)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@pytest.mark.parametrize("kind", ["llama_tied", "gemma2", "mistral", "gpt2", "phi", "gpt_oss"])
def test_a_causal_model_gives_what_it_gives_for_embeddings(kind):
    model = build(kind)
    base = model(input_ids=IDS).logits
    layer = prompted(model)
    with disabled(model):
        assert torch.equal(model(input_ids=IDS).logits, base)
    expected = fed(model, layer, IDS).logits[:, P:]
    assert (expected - base).abs().max() > 0.1
    got = model(input_ids=IDS, output_hidden_states=True)
    close(got.logits, expected)
    assert {states.shape[1] for states in got.hidden_states} == {7}
    short = fed(model, layer, IDS[1:, :SHORT]).logits[0, P:]
    view, positions = CausalLM(model), torch.arange(7).expand(2, -1)
    close(view.logits(view.hidden(IDS, positions, mask=MASK))[1, :SHORT], short)
    packed = torch.cat([IDS[0], IDS[1, :SHORT]])[None]
    at = torch.cat([torch.arange(7), torch.arange(SHORT)])[None]
    states = view.logits(view.hidden(packed, at, bounds=(0, 7, 12)))[0]
    close(states, torch.cat([expected[0], short]))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_segments_that_share_their_beginning_share_the_prompt_before_it(kind):
    """Both answers (2 and 3 tokens) of one row behind its 4 tokens, which are held once; then a row that shares nothing."""
    model = build(kind)
    layer = prompted(model)
    inject_prompt(model, 2, adapter_name="second", seed=5)
    view, (a, b, other) = CausalLM(model), (IDS[0, :6], torch.cat([IDS[0, :4], IDS[1, :3]]), IDS[1])
    expected = [view.logits(view.hidden(row[None], torch.arange(len(row))[None]))[0] for row in (a, b, other)]
    ids = torch.cat([a, b[4:], other])[None]
    at = torch.cat([torch.arange(6), torch.arange(4, 7), torch.arange(7)])[None]
    got = view.logits(view.hidden(ids, at, bounds=(0, 6, 9, 16), shared=(None, (0, 4), None)))[0]
    close(got, torch.cat([expected[0], expected[1][4:], expected[2]]))
    assert layer.enabled


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "llama4", "falcon_h1"])
def test_generation_with_a_cache_is_generation_without_and_padding_is_none(kind):
    model = build(kind)
    layer = prompted(model)
    left, mask = IDS.clone(), MASK.flip(1).long()
    left[1, 2:] = IDS[1, :SHORT]
    model.generation_config.eos_token_id = None
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=left, **options)
    assert torch.equal(cached, model.generate(input_ids=left, use_cache=False, **options))
    row = IDS[1:, :SHORT]
    for _ in range(5):
        row = torch.cat([row, fed(model, layer, row).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached[1, 2:], row[0])


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_a_decoder_attends_to_the_prompt_of_its_encoder(kind):
    model = build_for(kind, "seq2seq_lm")
    layer = prompted_encoder(model)
    target = IDS.flip(0)
    own = model.get_encoder().get_input_embeddings()
    with disabled(model):
        embeds = torch.cat([layer.prompt.expand(2, -1, -1), own(IDS)], 1)
        mask = torch.cat([torch.ones(2, P, dtype=torch.bool), MASK], 1)
        expected = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=target).logits
        base = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=target).logits
        told = model.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
    assert (expected - base).abs().max() > 1e-2
    close(model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=target).logits, expected)
    view = Seq2SeqLM(model)
    close(view.logits(view.hidden(IDS, MASK, target, None)), expected)
    own_way = model.generate(
        input_ids=IDS, attention_mask=MASK.long(), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert torch.equal(own_way, told)


def prompted_encoder(model):
    layer = inject_prompt(model, P)
    with torch.no_grad():
        layer.prompt.copy_(torch.randn(layer.prompt.shape, generator=torch.Generator().manual_seed(2)))
    return layer


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "llama"])
def test_a_classifier_reads_the_same_padded_packed_and_by_embeddings(kind):
    model = build_for(kind, "sequence_classification")
    layer = prompted(model)
    view = Classifier(model, "sequence_classification")
    expected = torch.cat([fed(model, layer, row).logits for row in (IDS[:1], IDS[1:, :SHORT])])
    assert (expected - model_off(model)).abs().max() > 1e-3
    positions = torch.arange(7).expand(2, -1)
    close(view.row_logits(IDS, positions, mask=MASK), expected)
    # Heads of the other encoders have steps that are no modules, so the admission check refuses to pack for them.
    if kind not in ("distilbert", "modernbert"):
        packed = torch.cat([IDS[0], IDS[1, :SHORT]])[None]
        at = torch.cat([torch.arange(7), torch.arange(SHORT)])[None]
        close(view.row_logits(packed, at, bounds=(0, 7, 12)), expected)


def model_off(model):
    with disabled(model):
        return torch.cat([model(input_ids=row).logits for row in (IDS[:1], IDS[1:, :SHORT])])


def test_gradients_are_those_of_embeddings_also_when_activations_are_recomputed():
    model = build("llama")
    layer = prompted(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.prompt"]
    expected = torch.autograd.grad(fed(model, layer, IDS).logits[:, P:].square().mean(), layer.prompt)[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = torch.autograd.grad(model(input_ids=IDS, use_cache=False).logits.square().mean(), layer.prompt)[0]
    close(got, expected)


def test_two_prompts_stand_before_one_another_and_beside_lora():
    model = build("llama")
    inject_lora(model, LoRAConfig(r=2, target=("q_proj",)))
    first = prompted(model)
    second = inject_prompt(model, 2, adapter_name="second", seed=5)
    own = model.get_input_embeddings()(IDS)
    got = model(input_ids=IDS).logits
    with disabled(model, ["prompt", "second"]):
        embeds = torch.cat([second.prompt.expand(2, -1, -1), first.prompt.expand(2, -1, -1), own], 1)
        close(got, model(inputs_embeds=embeds).logits[:, 5:])


def test_a_copy_is_on_its_own_and_a_layer_that_was_taken_out_has_no_effect():
    model = build("llama")
    base = model(input_ids=IDS).logits
    layer = prompted(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.prompt.zero_()
    assert not torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    replace_module(model, "model.embed_tokens", layer.base)
    assert torch.equal(model(input_ids=IDS).logits, base)


def test_what_it_begins_as():
    table = build("llama").get_input_embeddings().weight
    drawn = inject_prompt(build("llama"), 20).prompt
    rows = (drawn[:, None] == table).all(-1).nonzero()[:, 1]
    assert len(rows.unique()) == 20
    assert torch.equal(drawn, inject_prompt(build("llama"), 20).prompt)
    assert not torch.equal(drawn, inject_prompt(build("llama"), 20, seed=1).prompt)
    assert torch.equal(inject_prompt(build("llama"), 5, ids=[4, 9]).prompt, table[[4, 9, 4, 9, 4]])
    random = inject_prompt(build("llama"), 50, start="random").prompt
    assert random.min() >= -0.5 and random.max() <= 0.5 and random.std() > 0.25


class Reader(nn.Module):
    """A net of one's own: torch's encoder and a mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(V, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)

    def forward(self, ids):
        return self.encoder(self.words(ids)).mean(1)


def test_in_a_net_of_ones_own_the_embedding_gives_more():
    net = Reader().eval().requires_grad_(False)  # else torch runs other kernels before the freeze than after it
    base = net(IDS)
    layer = inject_prompt(net, P)
    expected = net.encoder(torch.cat([layer.prompt.expand(2, -1, -1), net.words.base(IDS)], 1)).mean(1)
    close(net(IDS), expected)
    with disabled(net):
        assert torch.equal(net(IDS), base)


def test_two_prompts_in_a_net_of_ones_own_stand_before_one_another():
    net = Reader().eval().requires_grad_(False)
    first = inject_prompt(net, P)
    second = inject_prompt(net, 2, adapter_name="second")
    table = net.words.base.base.weight
    assert ((second.prompt[:, None] == table).all(-1).sum(1) == 1).all(), "it begins as words, not as the other prompt"
    rows = [second.prompt.expand(2, -1, -1), first.prompt.expand(2, -1, -1), table[IDS]]
    close(net(IDS), net.encoder(torch.cat(rows, 1)).mean(1))
    text = inject_prompt(Reader(), 2, ids=[5, 6])
    assert torch.equal(text.prompt, text.base.weight[[5, 6]])


def test_refusals():
    model = build("gpt2")
    layer = prompted(model)
    with pytest.raises(Refusal, match="62 tokens and the prompt's 3 do not fit .* shorten rows to 61"):
        model(input_ids=torch.ones(1, 62, dtype=torch.long))
    with pytest.raises(Refusal, match="attention mask as"):
        model.transformer(input_ids=IDS, attention_mask=torch.ones(2, 1, 7, 7))
    with pytest.raises(Refusal, match="prompt adapter 'prompt', which cannot be merged"):
        merged_copy(model)
    with pytest.raises(Refusal, match="already carries an adapter called 'prompt'"):
        inject_prompt(model, P)
    with pytest.raises(Refusal, match="says itself which embedding"):
        inject_prompt(build("gpt2"), P, target="transformer.wte")
    with pytest.raises(Refusal, match="needs one embedding to stand before, and Linear has 0"):
        inject_prompt(nn.Linear(2, 2), P)
    mamba = build("mamba", None)
    inject_prompt(mamba, P)
    with pytest.raises(Refusal, match="recurrent state of MambaModel"):
        mamba.generate(input_ids=IDS, max_new_tokens=2)
    assert layer.enabled
