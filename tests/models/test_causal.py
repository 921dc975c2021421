"""The parts of a causal model put together again give what the whole gives, packed and padded, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from tests.models.architectures import PACKABLE, V, build

LENGTHS = (3, 9, 6)
BOUNDS = (0, 3, 12, 18)


def packed_row() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randint(V, (1, 18)), torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_equals_separate(kind: str) -> None:
    """Log-probabilities and gradients of every weight, against the model's own forward on each row alone."""
    model = build(kind)
    view = CausalLM(model)
    assert view.supports_packing
    ids, positions = packed_row()
    labels = torch.randint(V, (18,))
    weight = torch.randn(18)
    hidden = view.hidden(ids, positions, bounds=BOUNDS)
    scores = view.score(hidden[0], labels)["logprob"]
    own = torch.cat([model(part, use_cache=False).logits[0] for part in ids.split(LENGTHS, 1)])
    truth = own.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(scores, truth, atol=1e-4, rtol=0)
    used = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((scores * weight).sum(), used, allow_unused=True)
    slopes = torch.autograd.grad((truth * weight).sum(), used, allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), found, slopes, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max().clamp(min=1)), rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", [*PACKABLE, "mamba", "llama4", "falcon_h1"])
def test_padded_equals_separate(kind: str) -> None:
    """Rows padded on the right give the model's own logits of each row, with transformers' default attention too."""
    ids, _ = packed_row()
    for attn in ("lightning_ft", None) if kind in PACKABLE else (None,):
        model = build(kind, attn)
        view = CausalLM(model)
        rows = ids[0].split(LENGTHS)
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r, dtype=torch.bool) for r in rows], batch_first=True)
        with torch.no_grad():
            logits = view.logits(view.hidden(batch, torch.arange(9).expand(3, -1), mask=mask))[mask]
            own = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
        torch.testing.assert_close(logits, own, atol=1e-4, rtol=1e-4)


def test_head_parameters_see_ties_and_injection() -> None:
    """A tied weight and factors wrapped around the head belong to it."""
    model = build("llama_tied")
    view = CausalLM(model)
    assert view.head_parameters()[0] is model.get_input_embeddings().weight
    model.lm_head.extra = nn.Parameter(torch.zeros(1))
    assert len(view.head_parameters()) == 2


def test_refusals() -> None:
    """No head, no attention for packed rows: one sentence each."""
    with pytest.raises(Refusal, match="no language-model head"):
        CausalLM(build("llama").model)
    with pytest.raises(Refusal, match="no language-model head"):
        CausalLM(nn.Linear(2, 2))
    view = CausalLM(build("llama", "sdpa"))
    assert not view.supports_packing
    with pytest.raises(Refusal, match="turn packing off"):
        view.hidden(torch.zeros(1, 4, dtype=torch.long), bounds=(0, 2, 4))
