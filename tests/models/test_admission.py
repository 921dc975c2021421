"""What is admitted, what is refused, and that the check can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import admit
from lightning_ft.models.causal import CausalLM
from tests.models.architectures import PACKABLE, build


@pytest.mark.parametrize("kind", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_admitted(kind: str, dtype: torch.dtype) -> None:
    """These pack, in both dtypes."""
    admission = admit(build(kind).to(dtype), packing=True)
    assert admission.packing and admission.packing_reason == "" and admission.layers == 2
    assert admission.difference < (1e-3 if dtype == torch.float32 else 0.1)
    assert admission.tied == (kind in ("llama_tied", "gemma2", "gpt2", "cohere"))


@pytest.mark.parametrize(
    ("kind", "attn", "reason"),
    [
        ("llama", "sdpa", "knows no segments"),
        ("gpt_neo", None, "knows no segments"),
        ("mamba", "lightning_ft", "cannot run packed rows"),
        ("falcon_h1", "lightning_ft", "mix neighbouring segments"),
        ("llama4", "lightning_ft", "chunks of 4 tokens"),
    ],
)
def test_padded_only(kind: str, attn: str | None, reason: str) -> None:
    """These run padded; packing is off and the reason is given."""
    model = build(kind, attn)
    admission = admit(model, packing=True)
    assert not admission.packing and reason in admission.packing_reason
    assert admit(model, packing=False).packing_reason == ""


def test_a_head_that_is_more_than_a_layer_is_refused() -> None:
    """BERT's decoder transforms hidden states before its last layer."""
    with pytest.raises(Refusal, match="differ from its own"):
        admit(build("bert_decoder"), packing=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("fault", ["one segment", "shifted", "unscaled"])
def test_the_check_can_tell(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, fault: str) -> None:
    """A segment that sees its neighbour, and logits without their soft-cap or scale, are found in both dtypes."""
    original = CausalLM.hidden

    def merged(self: CausalLM, *args: Any, bounds: tuple[int, ...] | None = None, **kwargs: Any) -> torch.Tensor:
        return original(self, *args, bounds=bounds and (0, bounds[-1]), **kwargs)

    model = build(kind).to(dtype)
    if fault == "one segment":
        monkeypatch.setattr(CausalLM, "hidden", merged)
        assert "mix neighbouring" in admit(model, packing=True).packing_reason
    elif fault == "shifted":
        monkeypatch.setattr(CausalLM, "logits", lambda self, h: self.head(h.roll(1, 0)))
        with pytest.raises(Refusal, match="differ from its own"):
            admit(model, packing=False)
    else:
        monkeypatch.setattr(CausalLM, "logits", lambda self, h: 2.0 * self.head(h))
        with pytest.raises(Refusal, match="differ from its own"):
            admit(model, packing=False)


def test_modes_are_restored() -> None:
    """Train mode, module by module, and no gradients."""
    model = build("llama").train()
    model.model.layers[1].eval()
    admit(model, packing=True)
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert all(p.grad is None for p in model.parameters())


def test_no_layers_is_refused() -> None:
    """A model without repeated blocks."""
    model = build("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(Refusal, match="no list of repeated blocks"):
        admit(model, packing=False)
