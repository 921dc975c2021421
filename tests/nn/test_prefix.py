"""Learned prefixes: what they compute, on every kind of model, packed, padded, checkpointed and generated from."""

import copy

import pytest
import torch
import transformers as hf

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn import attention
from lightning_ft.nn.prefix import PrefixAttention, PrefixConfig, PrefixNetwork, inject_prefix
from lightning_ft.nn.prompt import inject_prompt
from lightning_ft.nn.registry import disabled, injected_layers
from tests.models.architectures import CAUSAL, V, build, build_for
from tests.tolerances import TOL

P = 5
CLOSE = {"rtol": TOL[torch.float32], "atol": TOL[torch.float32]}
#: Reached, with windows wide enough for the rows here.
DECODERS = (
    "llama",
    "llama_tied",
    "qwen3",
    "gemma2",
    "mistral",
    "phi",
    "gpt2",
    "granite",
    "cohere",
    "mixtral",
    "gpt_oss",
)
REFUSED = {
    "mamba": "none of its layers calls",
    "deberta_v2": "none of its layers calls",
}


def draw(*shape, low=4):
    return torch.randint(low, V, shape, generator=torch.Generator().manual_seed(sum(shape)))


def wide(kind):
    """A model whose window is wider than any row here."""
    config = CAUSAL[kind]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 64
    config._attn_implementation = attention.NAME
    attention.register()
    torch.manual_seed(0)
    return hf.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def shaken(model):
    """The model with a trained, not a first, prefix."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in injected_layers(model).values():
            for parameter in layer.injected_parameters().values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def with_prefix(model, **config):
    inject_prefix(model, PrefixConfig(length=P, **config), seed=1)
    return shaken(model)


@pytest.mark.parametrize("network", [None, 16], ids=["direct", "network"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_prefix_of_real_tokens_is_those_tokens_in_front(kind, network):
    model = wide(kind)
    start, row = draw(P), draw(2, 7)
    whole = torch.cat([start.expand(2, -1), row], 1)
    with torch.no_grad():
        expected = model(whole).logits[:, P:]
    inject_prefix(model, PrefixConfig(length=P, network=network), tokens=start.tolist())
    with torch.no_grad():
        torch.testing.assert_close(model(row).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["prefix", "prompt"])
def test_a_soft_prompt_behind_a_prefix(first):
    model = wide("llama")
    start, middle, row = draw(P), draw(4), draw(2, 7)
    whole = torch.cat([start.expand(2, -1), middle.expand(2, -1), row], 1)
    expected = model(whole).logits[:, P + 4 :]
    if first == "prompt":
        inject_prompt(model, 4, ids=middle.tolist())
    inject_prefix(model, PrefixConfig(length=P), tokens=start.tolist())
    if first == "prefix":
        inject_prompt(model, 4, ids=middle.tolist())
    view = CausalLM(model)
    packed = view.hidden(row.reshape(1, -1), torch.arange(7).repeat(2)[None], bounds=(0, 7, 14))
    torch.testing.assert_close(view.logits(packed).view_as(expected), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(row).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_equals_padded_equals_alone(kind):
    model = with_prefix(build(kind))
    view = CausalLM(model)
    rows = [draw(n) for n in (7, 3, 6)]
    alone = [model(row[None]).logits[0] for row in rows]
    padded = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, True
    together = model(padded, attention_mask=mask).logits
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    hidden = view.hidden(torch.cat(rows)[None], positions, bounds=(0, 7, 10, 16))
    packed = view.logits(hidden)[0].split([7, 3, 6])
    for i, row in enumerate(rows):
        torch.testing.assert_close(packed[i], alone[i], **CLOSE)
        torch.testing.assert_close(together[i, : len(row)], alone[i], **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
def test_generation_with_a_cache_is_generation_without(kind, cache):
    model = with_prefix(build(kind))
    short, long = draw(3), draw(6)
    ids = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), short]), long])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    for row, prompt in zip(made, (short, long), strict=True):
        grown = prompt[None]
        for _ in range(6):
            grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(row[-6:], grown[0, -6:])


def test_the_prefix_is_added_to_attention_as_the_paper_writes_it():
    """Equation by hand in float64 for one layer of Llama: softmax over [prefix, own] with keys behind P positions."""
    model = with_prefix(build("llama").double())
    block = model.model.layers[0].self_attn
    assert isinstance(block, PrefixAttention)
    keys, values = block.table()
    seen = {}
    block.base.q_proj.register_forward_hook(lambda m, a, out: seen.update(q=out))
    block.base.k_proj.register_forward_hook(lambda m, a, out: seen.update(k=out))
    block.base.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out))
    block.base.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    row = draw(1, 6)
    model(row)
    q, k, v = (seen[n].view(6, -1, 8).transpose(0, 1) for n in "qkv")  # (heads, T, d)
    angle = (torch.arange(6) + P)[:, None] / 10000 ** (torch.arange(0, 8, 2).double() / 8)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    turn = lambda x: x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin  # noqa: E731
    q, k = turn(q), turn(k)
    for head in range(4):
        k_all = torch.cat([keys[head // 2], k[head // 2]])
        v_all = torch.cat([values[head // 2], v[head // 2]])
        scores = q[head] @ k_all.T / 8**0.5
        scores[:, P:] += torch.full((6, 6), float("-inf")).triu(1).nan_to_num(0.0, neginf=float("-inf"))
        expected = scores.softmax(-1) @ v_all
        torch.testing.assert_close(seen["out"][0, :, 8 * head : 8 * head + 8], expected, rtol=1e-6, atol=1e-6)


def test_a_window_never_hides_the_prefix():
    model = with_prefix(build("mistral"))  # a window of 4
    row = draw(1, 12)
    before = model(row).logits[0, -1]
    with torch.no_grad():
        for layer in injected_layers(model).values():
            if isinstance(layer, PrefixAttention):
                layer.prefix_value.mul_(2.0)
    assert (model(row).logits[0, -1] - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"])
def test_encoders_padded_equals_alone(kind):
    model = with_prefix(build_for(kind, "token_classification").double())
    rows = [draw(n) for n in (7, 3)]
    padded, mask = torch.full((2, 7), 1), torch.zeros(2, 7, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    together = model(padded, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = model(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits[0]
        torch.testing.assert_close(together[i, : len(row)], alone, **CLOSE)
        with disabled(model):
            assert (alone - model(row[None]).logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("parts", [("decoder",), ("encoder",), ("cross",), ("encoder", "decoder", "cross")])
@pytest.mark.parametrize("kind", ["t5", "umt5", "bart", "marian"])
def test_sequence_to_sequence(kind, parts):
    model = with_prefix(build_for(kind, "seq2seq_lm").double(), parts=parts)
    source, target = draw(2, 6), draw(2, 5)
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    alone = model(input_ids=source[1:, :4], decoder_input_ids=target[1:]).logits
    torch.testing.assert_close(logits[1:], alone, **CLOSE)
    with disabled(model):
        assert (
            logits - model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        ).abs().max() > 1e-2
    made = model.generate(source, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    slow = model.generate(
        source, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(made, slow)


@pytest.mark.parametrize("kind", ["t5", "umt5", "bart", "marian"])
def test_decoder_tokens_in_front_are_the_prefix(kind):
    model = build_for(kind, "seq2seq_lm").double()
    start, source, target = draw(P), draw(2, 6), draw(2, 4)
    whole = torch.cat([start.expand(2, -1), target], 1)
    expected = model(input_ids=source, decoder_input_ids=whole).logits[:, P:]
    # The decoder's keys depend on what it reads from the encoder, so those of one source are taken.
    inject_prefix(model, PrefixConfig(length=P, parts=("decoder",)))
    twin = build_for(kind, "seq2seq_lm").double()
    cache = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    twin(input_ids=source[:1], decoder_input_ids=start[None], past_key_values=cache)
    for number, layer in enumerate(x for x in injected_layers(model).values() if isinstance(x, PrefixAttention)):
        stored = cache.self_attention_cache.layers[number]
        layer.fill(stored.keys[0], stored.values[0])
    torch.testing.assert_close(model(input_ids=source[:1], decoder_input_ids=target[:1]).logits, expected[:1], **CLOSE)


@pytest.mark.parametrize("network", [None, 8], ids=["direct", "network"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_checkpointing_and_accumulation_keep_the_gradients(kind, network):
    task = "seq2seq_lm" if kind == "t5" else "causal_lm"
    model = with_prefix(build_for(kind, task), network=network)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    inputs = {"input_ids": draw(2, 6), "labels": draw(2, 6)}
    for one in (model, again):
        one.train()(**inputs).loss.backward()
    trained = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("prefix" in name), name
        if parameter.grad is not None:
            torch.testing.assert_close(trained[name].grad, parameter.grad, **CLOSE)


def test_counts_are_the_papers():
    """Direct: P tokens, two tables a layer, K d wide; network: P D + (D m + m) + (m N + N), N all layers' numbers."""
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    direct, network = build("llama"), build("llama")
    inject_prefix(direct, PrefixConfig(length=7))
    inject_prefix(network, PrefixConfig(length=7, network=16))
    numbers = 2 * 2 * (2 * 8)
    assert count(direct) == 7 * numbers
    assert count(network) == 7 * 32 + (32 * 16 + 16) + (16 * numbers + numbers)
    kinds = [layer for layer in injected_layers(network).values() if isinstance(layer, PrefixNetwork)]
    assert len(kinds) == 1


def test_disabled_is_the_base_to_the_bit():
    base, model = build("llama"), with_prefix(build("llama"))
    row = draw(2, 6)
    with disabled(model):
        assert torch.equal(model(row).logits, base(row).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_with_another_implementation_becomes_ours(implementation):
    row = draw(2, 6)
    other, ours = with_prefix(build("llama", implementation)), with_prefix(build("llama"))
    torch.testing.assert_close(other(row).logits, ours(row).logits, **CLOSE)
    other.config._attn_implementation = implementation
    with pytest.raises(Refusal, match="implementation was changed after the prefix was injected"):
        other(row)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_reached_is_refused(kind):
    task = {"deberta_v2": "sequence_classification"}.get(kind, "causal_lm")
    model = build_for(kind, task, "eager")
    with pytest.raises(Refusal, match=REFUSED[kind]):
        inject_prefix(model)
    assert not injected_layers(model)


def test_rows_longer_than_the_table_are_refused():
    model = build("gpt2")  # 64 positions
    inject_prefix(model, PrefixConfig(length=P))
    model(draw(1, 64 - P))
    with pytest.raises(Refusal, match="A row of 60 tokens behind a prefix of 5 does not fit the model's table of 64"):
        model(draw(1, 60))
    with pytest.raises(Refusal, match="leaves no room in the model's table of 64 positions"):
        inject_prefix(build("gpt2"), PrefixConfig(length=64))


def test_what_means_nothing_is_refused():
    model = build("llama")
    with pytest.raises(Refusal, match="needs 5 tokens"):
        inject_prefix(model, PrefixConfig(length=5), tokens=[1, 2])
    with pytest.raises(Refusal, match="width 3 cannot give 5 tokens"):
        inject_prefix(model, PrefixConfig(length=5, network=3), tokens=[4, 5, 6, 7, 9])
    with pytest.raises(Refusal, match="parts is for models with an encoder and a decoder"):
        inject_prefix(model, PrefixConfig(parts=("encoder",)))
    with pytest.raises(Refusal, match="needs one Hugging Face model of text"):
        inject_prefix(torch.nn.Linear(2, 2))
    inject_prefix(model)
    with pytest.raises(Refusal, match="carries the prefix 'prefix' already"):
        inject_prefix(model, PrefixConfig(adapter_name="second"))


def test_bfloat16_keeps_the_prefix_in_float32():
    model = with_prefix(build("llama").bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(draw(1, 6)).logits.dtype == torch.bfloat16
