"""Packed attention against attention of each segment alone, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn import attention as at
from tests.tolerances import TOL

BOUNDS = (0, 3, 4, 12, 19)
CAUSAL: Any = SimpleNamespace(is_causal=True)


def qkv(dtype: torch.dtype = torch.float32, heads: int = 4, kv: int = 2, tokens: int = 19, d: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, h, tokens, d, dtype=dtype, requires_grad=True) for h in (heads, kv, kv)]


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[int, ...],
    *,
    causal: bool = True,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One T x T mask over the packed row and the formula of attention: (1, T, H, d)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    segment = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    allowed = segment[:, None] == segment[None, :]
    i, j = torch.arange(bounds[-1])[:, None], torch.arange(bounds[-1])[None, :]
    if causal:
        allowed = allowed & (i >= j)
    if window is not None:
        allowed = allowed & ((i - j).abs() < window)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (scale or q.shape[-1] ** -0.5)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + (sinks.exp().view(1, -1, 1, 1) if sinks is not None else 0)
    return torch.einsum("bhij,bhjd->bihd", weights / total, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_equals_the_formula(
    causal: bool, window: int | None, cap: float | None, sinks: bool, heads: tuple[int, int]
) -> None:
    """Values and gradients equal a dense float64 mask, for every combination of what models ask for."""
    q, k, v = qkv(torch.float64, *heads)
    s = torch.randn(heads[0], dtype=torch.float64, requires_grad=True) if sinks else None
    leaves = [q, k, v] + ([s] if s is not None else [])
    expected = oracle(q, k, v, BOUNDS, causal=causal, window=window, cap=cap, sinks=s, scale=0.4)
    g = torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, leaves, g)
    found, _ = at.attention(
        CAUSAL, q, k, v, None, segment_bounds=BOUNDS, scaling=0.4, is_causal=causal, sliding_window=window,
        softcap=cap, s_aux=s,
    )  # fmt: skip
    # The written-out path takes its softmax in float32.
    tolerance = 1e-6 if cap is not None or sinks else TOL[torch.float64]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    for a, b in zip(torch.autograd.grad(found, leaves, g), slopes, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * 10, rtol=0)


@pytest.mark.parametrize("lengths", [(5, 9), (130, 20)])
def test_bfloat16(lengths: tuple[int, int]) -> None:
    """Short segments (computed in float32) and long ones agree with float64, and keep the dtype."""
    bounds = (0, lengths[0], sum(lengths))
    q, k, v = qkv(torch.bfloat16, tokens=bounds[-1])
    found, _ = at.attention(CAUSAL, q, k, v, None, segment_bounds=bounds)
    assert found.dtype == torch.bfloat16
    expected = oracle(q.double(), k.double(), v.double(), bounds)
    torch.testing.assert_close(found.double(), expected, atol=TOL[torch.bfloat16], rtol=TOL[torch.bfloat16])


@pytest.mark.parametrize("window", [None, 3])
def test_short_segments_stay_in_float32_under_autocast(window: int | None) -> None:
    """Bit for bit: autocast would cast what attention is given back to bfloat16, whose kernel is slow there."""
    q, k, v = qkv(torch.bfloat16, tokens=14)
    options = {"segment_bounds": (0, 5, 14), "sliding_window": window}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = at.attention(CAUSAL, q, k, v, None, **options)  # type: ignore[arg-type]
    wide, _ = at.attention(CAUSAL, q.float(), k.float(), v.float(), None, **options)  # type: ignore[arg-type]
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_agrees(causal: bool, window: int | None) -> None:
    """The path of GPUs in float32 gives the same numbers, checked here without compilation."""
    q, k, v = (x.detach() for x in qkv())
    found = at.flex(q, k, v, BOUNDS, 0.4, causal, window).transpose(1, 2)
    torch.testing.assert_close(found, oracle(q, k, v, BOUNDS, causal=causal, window=window, scale=0.4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [True, False])
def test_what_the_variable_length_kernel_is_told(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None, groups: bool
) -> None:
    """A stand-in that obeys the kernel's documentation (left, right: tokens seen beside oneself) gives our numbers.

    Older kernels want as many heads of keys as of queries.
    """

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, **given: Any
    ) -> Tensor:
        assert longest == 8 and starts.dtype == torch.int32
        assert given["enable_gqa"] if groups else "enable_gqa" not in given and k.shape[1] == q.shape[1]
        left, right = given["window_size"]
        out = []
        for a, b in zip(starts[:-1], starts[1:], strict=True):
            back = torch.arange(b - a)[:, None] - torch.arange(b - a)[None, :]
            seen = ((left < 0) | (back <= left)) & ((right < 0) | (-back <= right))
            heads = [x[a:b].transpose(0, 1) for x in (q, k, v)]
            parts = torch.nn.functional.scaled_dot_product_attention(
                *heads, seen, scale=given["scale"], enable_gqa=True
            )
            out.append(parts.transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr("lightning_ft.nn.attention_kernels._takes_groups", lambda: groups)
    q, k, v = qkv()
    found = at.varlen(q, k, v, BOUNDS, 0.4, causal, window).transpose(1, 2)
    torch.testing.assert_close(found, oracle(q, k, v, BOUNDS, causal=causal, window=window, scale=0.4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu(dtype: torch.dtype, window: int | None) -> None:
    """The kernels that a GPU picks, forward and backward."""
    q, k, v = qkv(dtype, d=32)
    g = torch.randn(1, 19, 4, 32)
    expected = oracle(q.double(), k.double(), v.double(), BOUNDS, window=window)
    slopes = torch.autograd.grad(expected, (q, k, v), g.double())
    leaves = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
    found, _ = at.attention(CAUSAL, *leaves, None, segment_bounds=BOUNDS, sliding_window=window)
    torch.testing.assert_close(found.double().cpu(), expected, atol=TOL[dtype] * 2, rtol=TOL[dtype] * 2)
    for a, b in zip(torch.autograd.grad(found, leaves, g.to("cuda", dtype)), slopes, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=TOL[dtype] * 5, rtol=TOL[dtype] * 5)


def test_a_mask_first_made_in_validation_serves_training() -> None:
    """Cached masks are no inference tensors."""
    q, k, v = qkv(tokens=11)
    with torch.inference_mode():
        at.attention(CAUSAL, q, k, v, None, segment_bounds=(0, 11), sliding_window=5)
    at.attention(CAUSAL, q, k, v, None, segment_bounds=(0, 11), sliding_window=5)[0].sum().backward()


def test_layer_decides_direction_unless_told() -> None:
    """An encoder's layer (is_causal False) sees its whole segment."""
    q, k, v = qkv()
    found, _ = at.attention(SimpleNamespace(is_causal=False), q, k, v, None, segment_bounds=BOUNDS)  # type: ignore[arg-type]
    torch.testing.assert_close(found, oracle(q, k, v, BOUNDS, causal=False))


@pytest.mark.parametrize(("cap", "sinks"), [(1.5, False), (None, True)])
@pytest.mark.parametrize("given", ["none", "bool", "float"])
def test_unpacked_soft_capping_and_sinks(cap: float | None, sinks: bool, given: str) -> None:
    """Without bounds, what sdpa cannot do is done with transformers' mask, whichever kind it is."""
    q, k, v = qkv()
    s = torch.randn(4) if sinks else None
    allowed = torch.ones(19, 19, dtype=torch.bool).tril()[None, None]
    mask = {"none": None, "bool": allowed, "float": torch.zeros(1, 1, 19, 19).masked_fill(~allowed, -1e30)}[given]
    found, _ = at.attention(CAUSAL, q, k, v, mask, softcap=cap, s_aux=s)
    torch.testing.assert_close(found, oracle(q, k, v, (0, 19), cap=cap, sinks=s))


def test_refusals() -> None:
    """Unknown arguments, several rows, a cache and wrong bounds are refused by name."""
    q, k, v = qkv()
    with pytest.raises(Refusal, match="position_bias"):
        at.attention(CAUSAL, q, k, v, None, segment_bounds=BOUNDS, position_bias=torch.zeros(1))
    with pytest.raises(Refusal, match="chunk_of_tokens"):
        at.attention(CAUSAL, q, k, v, None, segment_bounds=BOUNDS, chunk_of_tokens=3)
    at.attention(CAUSAL, q, k, v, None, segment_bounds=BOUNDS, chunk_of_tokens=None, position_ids=torch.arange(19))
    with pytest.raises(Refusal, match="one packed row"):
        at.attention(CAUSAL, q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v, None, segment_bounds=BOUNDS)
    with pytest.raises(Refusal, match="cache"):
        at.attention(CAUSAL, q, torch.cat([k, k], 2), torch.cat([v, v], 2), None, segment_bounds=BOUNDS)
    for bounds in ((0, 5), (1, 19), (0, 5, 5, 19), (0, 20)):
        with pytest.raises(Refusal, match="must rise"):
            at.attention(CAUSAL, q, k, v, None, segment_bounds=bounds)


def tiny(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    at.register()
    if kind == "gpt2":
        config: Any = GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **more
        )
        config._attn_implementation = at.NAME
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, **more,
    )  # fmt: skip
    config._attn_implementation = at.NAME
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_model_equals_separate_rows(kind: str, checkpointing: bool) -> None:
    """Logits and gradients of a packed row equal those of its segments alone, with activation checkpointing too."""
    model = tiny(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    ids = torch.randint(64, (1, BOUNDS[-1]))
    lengths = [b - a for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(
        ids, position_ids=positions, attention_mask=torch.zeros(1, 1, 1, 1), segment_bounds=BOUNDS, use_cache=False
    ).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert (alone - model(ids, use_cache=False).logits).abs().max() > 0.1, "the test must be able to fail"
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)
    g = torch.randn_like(packed)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(packed, weights, g), torch.autograd.grad(alone, weights, g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_padding_mask_is_not_dropped() -> None:
    """A left-padded row equals the row alone: the name has a mask function."""
    model = tiny("llama")
    ids = torch.randint(64, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-5)


def test_generation_needs_no_bounds() -> None:
    """Greedy generation with a cache equals plain sdpa's."""
    model = tiny("llama")
    ids = torch.randint(64, (2, 5))
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert ours.equal(theirs)


def test_registration_is_idempotent() -> None:
    """Registering twice changes nothing."""
    from transformers import AttentionInterface

    at.register()
    at.register()
    assert AttentionInterface()[at.NAME] is at.attention
