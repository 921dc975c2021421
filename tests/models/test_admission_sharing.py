"""Which models let answers share their prompt, and that the check can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_ft.models.admission_sharing import why_no_sharing
from lightning_ft.models.causal import CausalLM
from tests.models.architectures import PACKABLE, build


@pytest.mark.parametrize("kind", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_pack_share(kind: str, dtype: torch.dtype) -> None:
    """Windows, soft-caps, sinks, experts and rotary positions included."""
    model = build(kind).to(dtype).train()
    assert why_no_sharing(CausalLM(model)) == ""
    assert model.training


@pytest.mark.parametrize(
    ("kind", "attn", "reason"),
    [("llama", "sdpa", "knows no segments"), ("falcon_h1", None, "a beginning that is held once"), ("mamba", None, "")],
)
def test_others_take_whole_rows(kind: str, attn: str | None, reason: str) -> None:
    """Layers that carry a state from token to token cannot be told of the beginning."""
    found = why_no_sharing(CausalLM(build(kind, attn or "lightning_ft")))
    assert found and reason in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["unseen", "too short", "misplaced"])
def test_the_check_can_tell(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fault: str) -> None:
    original = CausalLM.hidden

    def wrong(self: CausalLM, ids: Any, positions: Any, *, shared: Any = None, **others: Any) -> torch.Tensor:
        if shared is not None and fault == "unseen":
            shared = None
        elif shared is not None and fault == "too short":
            shared = tuple(entry and (entry[0], entry[1] - 1) for entry in shared)
        elif shared is not None:
            positions = positions.clone()
            positions[:, -5:] += 3
        return original(self, ids, positions, shared=shared, **others)

    view = CausalLM(build("llama").to(dtype))
    monkeypatch.setattr(CausalLM, "hidden", wrong)
    assert "held once" in why_no_sharing(view)
