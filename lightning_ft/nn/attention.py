"""Block-diagonal attention for rows that are laid end to end, under transformers' attention interface.

A packed row holds S segments; a token may see its own segment only. Transformers hands ``segment_bounds`` (a keyword of
the model's forward) through to every attention layer, and the function here runs attention segment by segment, so
that no T x T mask is ever built. Without ``segment_bounds`` everything is as under transformers' own ``sdpa``, with the
two things that ``sdpa`` cannot do (soft-capping, sinks) computed openly.

Rows that begin alike (both answers of a preference pair, the answers of a group) need their common beginning once: with
``segment_shared`` a segment also sees the first tokens of an earlier one, before its own, as if it had been laid out
whole. Its tokens stand at the last places of what it sees, which is where the causal mask is aligned.

Packing is never left to transformers' guess from ``position_ids``, which is silently wrong in its default call.

Axes: H query heads, K key heads (K divides H), T tokens of the packed row, d width of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.attention_kernels import flex, varlen, varlen_can
from lightning_ft.nn.prefix_keys import LearnedPrefix, Recorder
from lightning_ft.nn.shared_segments import Shared, check_shared

NAME = "lightning_ft"

#: Segments up to this length run in float32 on a CPU although the model is in bfloat16, by the width of a head: on 16
#: segments of 60 tokens, 9 heads of 64, forward and backward took 12 ms that way and 26 ms in bfloat16. At 250 tokens
#: heads of 64 still gained 17 %, heads of 128 lost 10 %. Autocast is off there, or it would cast them back.
SHORT, SHORT_IF_WIDE, NARROW = 320, 128, 64

#: What models pass along that says nothing about which token sees which.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "deterministic",
    "num_items_in_batch",
    "logits_to_keep",
    "past_key_values",
    "layer_idx",
}


def register() -> None:
    """Make ``attn_implementation="lightning_ft"`` known to transformers. May be called again; never called at import.

    The name also needs a mask function: without one transformers drops the padding mask and says nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_bounds: tuple[int, ...] | None = None,
    segment_shared: Shared | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    learned_prefix: LearnedPrefix | Recorder | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One attention layer, as transformers' attention interface calls it.

    Args:
        module: the layer; its ``is_causal`` says whether tokens see what follows them, unless the argument does.
        query: (B, H, T, d); packed: B = 1.
        key: (B, K, T, d).
        value: (B, K, T, d).
        attention_mask: as transformers made it; not looked at when ``segment_bounds`` is given.
        segment_bounds: cumulative bounds (0, ..., T) of the segments of a packed row.
        segment_shared: for each segment (index of an earlier one that shares nothing itself, how many of its first tokens are
            seen before the segment's own), or None; causal layers only.
        scaling: what scores are multiplied by; 1 / sqrt(d) unless given.
        dropout: probability of dropping an attention weight.
        is_causal: overrides the layer's own.
        sliding_window: how many tokens back, itself included, a token sees in its own segment.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (H,) attention sinks: one more score per head that takes part in the softmax and has no value.
        learned_prefix: keys and values that every token sees before its own, each segment's tokens too (prefix tuning).
        **others: what else the model passes; anything that could change who sees whom is refused.

    Returns:
        (B, T, H, d) and None for the weights, which are never materialised.

    Raises:
        Refusal: an argument that packed attention does not know, or bounds that do not fit the row.
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if isinstance(learned_prefix, Recorder):
        learned_prefix.see(key, value, sliding_window)
        learned_prefix = None
    if segment_bounds is None:
        if learned_prefix is not None:
            tokens, keys = query.shape[2], key.shape[2]
            if attention_mask is None and is_causal and tokens > 1:
                attention_mask = _first_of_keys(tokens, keys, query.device)
            key, value = learned_prefix.before(key, value)
            attention_mask, is_causal = learned_prefix.extend(attention_mask, keys), False
            others = learned_prefix.extend_bias(others)
        # The window is in the mask that transformers made.
        return _unpacked(module, query, key, value, attention_mask, scaling, dropout, is_causal, softcap, s_aux, others)
    _check(query, key, segment_bounds, others)
    if segment_shared is not None:
        check_shared(segment_bounds, segment_shared, is_causal)
    if value.shape[-1] != key.shape[-1] or softcap is not None or s_aux is not None or learned_prefix is not None:
        out = _by_segment(
            query,
            key,
            value,
            segment_bounds,
            scaling,
            dropout,
            is_causal,
            sliding_window,
            softcap,
            s_aux,
            learned_prefix,
            segment_shared,
        )
    elif query.device.type == "cpu" or dropout > 0:
        out = _by_segment(
            query, key, value, segment_bounds, scaling, dropout, is_causal, sliding_window, shared=segment_shared
        )
    elif varlen_can(query):
        out = varlen(query, key, value, segment_bounds, scaling, is_causal, sliding_window, segment_shared)
    else:
        out = flex(query, key, value, segment_bounds, scaling, is_causal, sliding_window, segment_shared)
    return out.transpose(1, 2).contiguous(), None


def _check(query: Tensor, key: Tensor, bounds: tuple[int, ...], others: dict[str, Any]) -> None:
    for name, given in others.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise Refusal(
                f"Packed attention does not know the argument {name!r} that this model passes to its attention layers, "
                "and ignoring it could change the result; train this model with packing off."
            )
    tokens = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != tokens:
        raise Refusal(
            f"Packed attention takes one packed row whose tokens attend to one another, but got {query.shape[0]} rows "
            f"of {tokens} tokens and {key.shape[2]} keys (a key-value cache or cross-attention); use padded rows there."
        )
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or any(a >= b for a, b in pairwise(bounds)):
        raise Refusal(f"segment_bounds {bounds} must rise from 0 to the {tokens} tokens of the packed row.")


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    causal: bool,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix: LearnedPrefix | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """Each segment on its own; batches of segments of one length, padded or not, measured no faster on a CPU."""
    lengths = [b - a for a, b in pairwise(bounds)]
    shared = shared if shared is not None else (None,) * len(lengths)
    dtype = query.dtype
    short = 0
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        short = SHORT if query.shape[-1] <= NARROW else SHORT_IF_WIDE
        if max(lengths) <= short:  # one cast of the row is cheaper than one of each segment
            query, key, value = query.float(), key.float(), value.float()
    grouped = query.shape[1] != key.shape[1]
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    parts = []
    for q, k, v, seen in zip(query.split(lengths, 2), keys, values, shared, strict=True):
        if seen is not None:
            owner, count = seen
            k, v = (torch.cat([x[owner][:, :, :count], own], 2) for x, own in ((keys, k), (values, v)))
        tokens, visible = q.shape[2], k.shape[2]
        if visible <= short and q.dtype == dtype:
            q, k, v = q.float(), k.float(), v.float()
        banded = window is not None and visible > window
        openly = softcap is not None or sinks is not None
        mask = None
        if openly or banded or seen is not None or (prefix is not None and causal):
            mask = _band(tokens, visible, causal, window if banded else None, q.device)
        if prefix is not None:
            k, v = prefix.before(k, v)
            mask = prefix.extend(mask, visible)
        if openly:
            parts.append(_openly(q, k, v, mask, scaling, dropout, softcap, sinks))
            continue
        with torch.autocast("cpu", enabled=False) if q.dtype != dtype else nullcontext():
            alone = mask is None and prefix is None
            parts.append(attend(q, k, v, is_causal=causal) if alone else attend(q, k, v, mask))
    return torch.cat(parts, 2).to(dtype)


@lru_cache(maxsize=64)
def _band(tokens: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(T, L) bool, True where a token may look; the T tokens are the last of the L keys."""
    with torch.inference_mode(False):  # made during validation, it may be kept for a backward pass later
        at = torch.arange(keys, device=device)
        back = at[keys - tokens :, None] - at[None, :]  # how far back the key is
        allowed = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
        return allowed if window is None else allowed & (back.abs() < window)


def _first_of_keys(tokens: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask where the tokens are the first of the keys, which is how the kernels align it."""
    longest = max(tokens, keys)
    return _band(longest, longest, True, None, device)[:tokens, :keys]


def _openly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what no kernel offers. ``mask`` is boolean (True: may look) or added to the scores."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)  # in fp32, float64's lowest would be -inf: NaN for padding
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1, dtype=wide)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=wide)
    weights = F.dropout(weights.to(value.dtype), dropout) if dropout > 0 else weights.to(value.dtype)
    return weights @ value


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    """Padded or single rows, cross-attention and generation: transformers' own function and its own mask."""
    if softcap is None and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **others
        )
    if others.get("position_bias") is not None:
        raise Refusal("Attention with both a position bias and soft-capping or sinks is not known here; use eager.")
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None and causal and tokens > 1:
        # sdpa's mask function leaves a plain causal mask to the kernel; the queries are the first of the keys.
        mask = _first_of_keys(tokens, keys, query.device)
    return _openly(query, key, value, mask, scaling, dropout, softcap, sinks).transpose(1, 2).contiguous(), None
