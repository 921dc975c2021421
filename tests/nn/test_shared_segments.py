"""Segments that share their beginning, against the same rows laid out whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn import attention as at
from lightning_ft.nn.shared_segments import Shared, keys_seen
from tests.nn.test_attention import CAUSAL, oracle, qkv, tiny
from tests.tolerances import TOL

# A prompt of 4 with answers of 3, 2 and 1; a row of its own; a prompt of 1 with answers of 1 and 4.
BOUNDS = (0, 7, 9, 10, 13, 15, 19)
SHARED: Shared = (None, (0, 4), (0, 4), None, None, (4, 1))


def whole() -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Places of the packed row that make up the rows laid out whole, their bounds, and where the packed tokens stand."""
    places, bounds, own = [], [0], []
    for (begin, end), seen in zip(pairwise(BOUNDS), SHARED, strict=True):
        row = list(range(begin, end))
        if seen is not None:
            row = list(range(BOUNDS[seen[0]], BOUNDS[seen[0]] + seen[1])) + row
        own += range(bounds[-1] + len(row) - (end - begin), bounds[-1] + len(row))
        places += row
        bounds.append(len(places))
    return torch.tensor(places), tuple(bounds), torch.tensor(own)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_equals_whole_rows(window: int | None, cap: float | None, sinks: bool, heads: tuple[int, int]) -> None:
    """Values and gradients: what is shared gathers the gradients of all that see it."""
    q, k, v = qkv(torch.float64, *heads)
    s = torch.randn(heads[0], dtype=torch.float64, requires_grad=True) if sinks else None
    leaves = [q, k, v] + ([s] if s is not None else [])
    places, bounds, own = whole()
    laid = [x[:, :, places] for x in (q, k, v)]
    expected = oracle(*laid, bounds, window=window, cap=cap, sinks=s, scale=0.4)[:, own]
    g = torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, leaves, g)
    found, _ = at.attention(
        CAUSAL, q, k, v, None, segment_bounds=BOUNDS, segment_shared=SHARED, scaling=0.4, sliding_window=window,
        softcap=cap, s_aux=s,
    )  # fmt: skip
    tolerance = 1e-6 if cap is not None or sinks else TOL[torch.float64]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    for a, b in zip(torch.autograd.grad(found, leaves, g), slopes, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * 10, rtol=0)


@pytest.mark.parametrize("prompt", [5, 330])
def test_bfloat16(prompt: int) -> None:
    """Short segments (computed in float32), and one whose shared beginning makes it long, keep the dtype."""
    bounds, shared = (0, prompt + 3, prompt + 10), (None, (0, prompt))
    q, k, v = qkv(torch.bfloat16, tokens=bounds[-1])
    found, _ = at.attention(CAUSAL, q, k, v, None, segment_bounds=bounds, segment_shared=shared)
    assert found.dtype == torch.bfloat16
    row = torch.cat([torch.arange(prompt), torch.arange(prompt + 3, prompt + 10)])
    wide = [x.double() for x in (q, k, v)]
    expected = oracle(*(x[:, :, row] for x in wide), (0, prompt + 7))[:, prompt:]
    torch.testing.assert_close(found[:, prompt + 3 :].double(), expected, atol=TOL[torch.bfloat16], rtol=0.01)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_agrees(window: int | None) -> None:
    q, k, v = (x.detach() for x in qkv())
    places, bounds, own = whole()
    expected = oracle(*(x[:, :, places] for x in (q, k, v)), bounds, window=window, scale=0.4)[:, own]
    found = at.flex(q, k, v, BOUNDS, 0.4, True, window, SHARED).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 3])
def test_what_the_variable_length_kernel_is_told(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """A stand-in that aligns the tokens of a segment with the last of its keys, as FlashAttention documents."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest: int, most: int, **given: Any
    ) -> Tensor:
        assert (longest, most) == (7, 7) and given["enable_gqa"]
        left, right = given["window_size"]
        out = []
        for (a, b), (c, d) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
            back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)[None, :]
            seen = ((left < 0) | (back <= left)) & ((right < 0) | (-back <= right))
            heads = [q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)]
            parts = nn.functional.scaled_dot_product_attention(*heads, seen, scale=given["scale"], enable_gqa=True)
            out.append(parts.transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr("lightning_ft.nn.attention_kernels._takes_groups", lambda: True)
    q, k, v = qkv()
    places, bounds, own = whole()
    expected = oracle(*(x[:, :, places] for x in (q, k, v)), bounds, window=window, scale=0.4)[:, own]
    torch.testing.assert_close(at.varlen(q, k, v, BOUNDS, 0.4, True, window, SHARED).transpose(1, 2), expected)


def test_what_each_segment_sees() -> None:
    places, bounds, _ = whole()
    found, ends = keys_seen(BOUNDS, SHARED, torch.device("cpu"))
    assert ends == bounds and found.tolist() == places.tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_sees_whole_rows(kind: str, checkpointing: bool) -> None:
    """Logits and gradients of a packed row with shared beginnings equal those of rows given one by one."""
    model = tiny(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    ids = torch.randint(64, (1, BOUNDS[-1]))
    places, bounds, own = whole()
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[own][None]
    packed = model(
        ids,
        position_ids=positions,
        attention_mask=torch.zeros(1, 1, 1, 1),
        segment_bounds=BOUNDS,
        segment_shared=SHARED,
        use_cache=False,
    ).logits
    rows = ids[:, places].split([b - a for a, b in pairwise(bounds)], 1)
    alone = torch.cat([model(row, use_cache=False).logits for row in rows], 1)[:, own]
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)
    g = torch.randn_like(packed)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(packed, weights, g), torch.autograd.grad(alone, weights, g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ((None, (0, 4)), "has 2 entries for 6 segments"),
        ((None, (1, 4), None, None, None, None), r"segment_shared\[1\]"),
        ((None, (0, 8), None, None, None, None), r"segment_shared\[1\]"),
        ((None, (0, 0), None, None, None, None), r"segment_shared\[1\]"),
        ((None, (0, 2), (1, 1), None, None, None), r"segment_shared\[2\]"),
    ],
)
def test_impossible_sharing_is_refused(shared: Shared, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        at.attention(CAUSAL, *qkv(), None, segment_bounds=BOUNDS, segment_shared=shared)


def test_layers_that_look_both_ways_are_refused() -> None:
    with pytest.raises(Refusal, match="looks both ways"):
        at.attention(CAUSAL, *qkv(), None, segment_bounds=BOUNDS, segment_shared=SHARED, is_causal=False)
