"""Attention over the segments of a packed row by one kernel, for GPUs; `lightning_ft.nn.attention` chooses."""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_ft.nn.shared_segments import Shared, keys_seen


def varlen_can(query: Tensor) -> bool:
    """Whether the variable-length kernel takes these tensors."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] > 256:
        return False
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


@lru_cache(maxsize=1)
def _takes_groups() -> bool:
    """Whether the kernel of this torch lets several heads of queries share one of keys; 2.11 does not yet."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@lru_cache(maxsize=8)
def _bounds_on(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """The bounds as the kernel wants them; cached, since every layer of a step asks for the same."""
    with torch.inference_mode(False):
        return torch.tensor(bounds, dtype=torch.int32, device=device)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    scaling: float | None,
    causal: bool,
    window: int | None,
    shared: Shared | None = None,
) -> Tensor:
    """Torch's own kernel for rows laid end to end (GPU, 16 bit); it aligns a segment's tokens with its last keys."""
    from torch.nn.attention.varlen import varlen_attn

    key_bounds = bounds
    if shared is not None:
        places, key_bounds = keys_seen(bounds, shared, query.device)
        key, value = key.index_select(2, places), value.index_select(2, places)
    longest, most_keys = (max(b - a for a, b in pairwise(ends)) for ends in (bounds, key_bounds))
    left = -1 if window is None else window - 1  # the kernel counts the tokens before the token itself
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if grouped and _takes_groups() else {}
    if grouped and not options:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    out = varlen_attn(
        q,
        k,
        v,
        _bounds_on(bounds, query.device),
        _bounds_on(key_bounds, query.device),
        longest,
        most_keys,
        scale=scaling,
        window_size=(left, 0 if causal else left),
        **options,
    )
    assert isinstance(out, Tensor)  # a pair only if the normaliser is asked for
    return out.transpose(0, 1).unsqueeze(0)


@lru_cache(maxsize=8)
def _block_mask(
    bounds: tuple[int, ...], shared: Shared | None, causal: bool, window: int | None, device: torch.device
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    spans = list(pairwise(bounds))
    entries = shared if shared is not None else (None,) * len(spans)
    # Of each segment: where the tokens that it borrows begin and end, and how many they are.
    borrowed = [(bounds[e[0]], bounds[e[0]] + e[1], e[1]) if e is not None else (0, 0, 0) for e in entries]
    with torch.inference_mode(False):
        lengths = torch.tensor([end - begin for begin, end in spans], device=device)
        segment = torch.repeat_interleave(torch.arange(len(spans), device=device), lengths)
        first, last, count = (torch.tensor(column, device=device) for column in zip(*borrowed, strict=True))
        begins = torch.tensor(bounds[:-1], device=device)
        position = torch.arange(bounds[-1], device=device) - (begins - count)[segment]

    def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = segment[q]
        inside = own == segment[k]
        if shared is not None:
            inside = inside | ((k >= first[own]) & (k < last[own]))
        if causal:
            inside = inside & (position[q] >= position[k])
        return inside & ((position[q] - position[k]).abs() < window) if window is not None else inside

    with torch.inference_mode(False):
        return create_block_mask(allowed, None, None, bounds[-1], bounds[-1], device=device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    scaling: float | None,
    causal: bool,
    window: int | None,
    shared: Shared | None = None,
) -> Tensor:
    """FlexAttention with a block mask: GPUs and dtypes that the variable-length kernel does not serve.

    Compiled on a GPU; elsewhere it runs openly, which is only good for checking it.
    """
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if query.device.type == "cuda" else flex_attention
    mask = _block_mask(bounds, shared, causal, window, query.device)
    return run(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
