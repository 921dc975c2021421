"""Whether rows that begin alike may hold their beginning once, proven by one short row; see ``models/admission.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ft.models.admission import TOLERANCE, evaluating, try_packed, vocabulary_of, why_no_packing
from lightning_ft.models.backbone import BackboneView

#: Tokens of a prompt, and of three answers to it; the first shares its row with the prompt.
PROMPT = 5
ANSWERS = (4, 6, 1)


@torch.no_grad()
def why_no_sharing(view: BackboneView, tokenizer: Any = None) -> str:
    """Run answers behind one copy of their prompt and behind one each, and compare every hidden state.

    Args:
        view: of a model on its device, loaded with packed attention, before or after injection. Its mode is restored.
        tokenizer: if given, its tokens are the ones tried.

    Returns:
        The reason why answers need a prompt each; empty when they do not.
    """
    if reason := why_no_packing(view):
        return reason
    model = view.model
    generator = torch.Generator().manual_seed(0)
    tokens = (PROMPT + sum(ANSWERS),)
    drawn = torch.randint(0, vocabulary_of(model, tokenizer), tokens, generator=generator, device="cpu")
    prompt, *answers = drawn.to(next(model.parameters()).device).split([PROMPT, *ANSWERS])

    def difference() -> float:
        # Of the answers that borrow: the first has its prompt before it in any case.
        expected = torch.cat([_states(view, [torch.cat([prompt, answer])])[PROMPT:] for answer in answers[1:]])
        found = _states(view, [torch.cat([prompt, answers[0]]), *answers[1:]])[PROMPT + ANSWERS[0] :]
        apart = (found - expected).abs().amax(-1)
        # As elsewhere: in 16 bit rounding may send a token to another expert.
        low = expected.dtype in (torch.bfloat16, torch.float16)
        size = float(expected.double().std())
        return float(apart.double().median() if low else apart.double().max()) / size

    with evaluating(model):
        limit = TOLERANCE.get(next(view.backbone.parameters()).dtype, 0.1)
        mixes = "some of its layers do not see a beginning that is held once"
        return try_packed(difference, type(model).__name__, limit, mixes)[0]


def _states(view: BackboneView, rows: list[Tensor]) -> Tensor:
    """Hidden states (T, D) of rows laid end to end, all after the first behind the prompt that the first begins with."""
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + len(row))
    starts = [0] + [PROMPT] * (len(rows) - 1)
    positions = torch.cat(
        [torch.arange(start, start + len(row), device=row.device) for start, row in zip(starts, rows, strict=True)]
    )
    shared = (None, *[(0, PROMPT)] * (len(rows) - 1)) if len(rows) > 1 else None
    return view.hidden(torch.cat(rows)[None], positions[None], bounds=tuple(bounds), shared=shared)[0]
