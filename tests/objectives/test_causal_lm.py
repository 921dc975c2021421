"""causal_lm: the sum of Hugging Face's own cross-entropy over the same labels, packed or padded, logits where scored."""

import math

import numpy as np
import pytest
import torch

from lightning_ft.data.collate import Segment, collate
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn.head_sums import Summed
from lightning_ft.objectives.causal_lm import causal_lm, scores
from tests.models.architectures import V, build
from tests.tolerances import TOL

# Uneven rows: two spans, a whole row, one token, nothing to learn.
SPANS = [(9, [(3, 5), (6, 9)]), (6, [(0, 6)]), (4, [(3, 4)]), (5, [])]


def segments():
    generator = np.random.default_rng(0)
    return [
        Segment(generator.integers(V, size=length), np.array(spans, dtype=np.int64).reshape(-1, 2), row)
        for row, (length, spans) in enumerate(SPANS)
    ]


def huggingface(model, reduction="sum"):
    """The same by transformers: one row at a time, labels -100 where nothing is scored."""
    total = torch.zeros((), dtype=torch.float64)
    for segment in segments():
        ids = torch.from_numpy(segment.ids)[None]
        labels = torch.full_like(ids, -100)
        for start, end in segment.spans:
            labels[0, start:end] = ids[0, start:end]
        count = int((labels[0, 1:] != -100).sum())
        if count:
            total = total + model(input_ids=ids, labels=labels).loss * count
    return total


@pytest.mark.parametrize("on_the_way", [True, False], ids=["gradient on the way", "gradient in backward"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gemma2"])
def test_value_and_gradients_are_those_of_transformers(kind, packed, on_the_way):
    model = build(kind).double()
    expected = huggingface(build(kind, attn="eager").double())
    oracle = build(kind, attn="eager").double()
    huggingface(oracle).backward()
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    together = [Summed()] if on_the_way else []
    term = causal_lm(CausalLM(model), collate(segments(), packed=packed), together)
    assert (term.name, term.unit, term.count) == ("sft", "token", 5 + 5 + 1)
    # The head sums in fp32 at least.
    torch.testing.assert_close(term.sum.double(), expected, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    term.sum.backward()
    assert len(calls) == (1 if on_the_way else 2), "of a trained head"
    theirs = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=TOL[torch.float32], atol=TOL[torch.float32], msg=name
        )


def test_an_untrained_uniform_model_costs_ln_v_a_token():
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    term = causal_lm(CausalLM(model), collate(segments(), packed=True))
    assert float(term.mean()) == pytest.approx(math.log(V), rel=1e-6)


def test_logits_exist_for_scored_tokens_alone():
    model = build("llama")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    made = scores(CausalLM(model), collate(segments(), packed=True))
    assert made["logprob"].shape == (11,)
    assert sum(seen) <= 11


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_of_fillers_costs_nothing_and_has_gradients_of_zero(packed):
    model = build("llama")
    term = causal_lm(CausalLM(model), collate([], packed=packed))
    assert term.count == 0 and float(term.mean()) == 0
    term.sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
