"""Which layers of an architecture make keys, values and the feed-forward's inner activations.

For the architectures that PEFT knows the names are PEFT's, so that a default adapter means the same layers in both;
among them are some that scale queries instead of keys, and fused layers that scale queries as well. For others the
names are looked up, and the layer that ends a feed-forward is known by its shape.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost, pristine_modules
from lightning_ft.nn.select import block_lists, is_conv1d, is_linear, layer_index, linear_names, matches

AUTO = "auto"

_LLAMA = (("k_proj", "v_proj"), ("down_proj",))
_QUERIES = (("q_proj", "v_proj"), ("down_proj",))
_FALCON = (("query_key_value",), ("dense_4h_to_h",))
_BERT = (("key", "value"), ("output.dense",))
_GPT2 = (("c_attn",), ("mlp.c_proj",))
_FC2 = (("q_proj", "v_proj"), ("fc2",))
KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bart": _FC2,
    "bert": _BERT,
    "bloom": (("query_key_value",), ("mlp.dense_4h_to_h",)),
    "deberta": (("in_proj",), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)),
    "falcon": _FALCON,
    "gemma": _QUERIES,
    "gemma2": _QUERIES,
    "gemma3_text": _QUERIES,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": (("q_proj", "v_proj"), ("c_proj",)),
    "gpt_neox": _FALCON,
    "gptj": (("q_proj", "v_proj"), ("fc_out",)),
    "llama": _LLAMA,
    "llama4": _QUERIES,
    "mistral": _LLAMA,
    "mixtral": (("k_proj", "v_proj"), ("w2",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "opt": (("q_proj", "k_proj"), ("fc2",)),
    "phi": _FC2,
    "qwen2": _QUERIES,
    "qwen3": _QUERIES,
    "roberta": _BERT,
    "t5": (("k", "v"), ("wo",)),
}
"""Model type -> (layers whose output is scaled, layers whose input is)."""

_KEYS_VALUES = (
    ("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("k_lin", "v_lin"), ("key_proj", "value_proj"), ("wk", "wv"),
    ("to_k", "to_v"),
)  # fmt: skip
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "to_qkv", "kv_proj")


def auto_targets(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns that ``auto`` means in a model: of all targets, and of those whose input is scaled.

    Raises:
        Refusal: If keys and values or the feed-forward cannot be told.
    """
    known = KNOWN.get(str(getattr(getattr(model, "config", None), "model_type", "")))
    linear = linear_names(model)
    if known is not None:
        outputs, inner = known
        missing = [end for end in (*outputs, *inner) if not any(matches(name, end) for name in linear)]
        if not missing:
            return (*outputs, *inner), inner
        if len(missing) == len(outputs) + len(inner):
            raise Refusal(
                f"IA3.target 'auto' means {', '.join(missing)} in this architecture, and the model has no such layers; name them."
            )
    outputs, inner = _keys_and_values(linear), _feed_forward_ends(model, linear)
    if not outputs:
        raise Refusal(
            "IA3.target 'auto' finds no layers that make keys and values here (nn.MultiheadAttention keeps them in one tensor); "
            f"name the layers to scale, among {', '.join(_ends(linear)[:6]) or 'none'}."
        )
    if not inner:
        raise Refusal(
            f"IA3.target 'auto' finds {', '.join(outputs)}, but no linear layer that ends a feed-forward (the experts of a "
            f"mixture are tensors, not layers); name what to scale: target [{', '.join(outputs)}]."
        )
    return (*outputs, *inner), inner


def _keys_and_values(linear: list[str]) -> tuple[str, ...]:
    """Return the ends of names under which layers make keys and values."""
    for pair in _KEYS_VALUES:
        if all(any(matches(name, end) for name in linear) for end in pair):
            return pair
    return tuple(end for end in _FUSED if any(matches(name, end) for name in linear))


def _feed_forward_ends(model: nn.Module, linear: list[str]) -> tuple[str, ...]:
    """Return the names of layers in blocks, outside attention, that read more features than they write."""
    places, sizes = pristine_modules(model), block_lists(linear)
    found = []
    for name in linear:
        module = innermost(places[name][1])
        if layer_index(name, sizes) is None or "att" in name.lower() or not is_linear(module):
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if is_conv1d(module):
            inputs, outputs = weight.shape
        else:
            inputs, outputs = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        if inputs > outputs:
            found.append(name)
    ends = _ends(found)
    exact = [name for name in linear if any(matches(name, end) for end in ends)] == found
    return tuple(ends if exact else found)


def _ends(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


__all__ = ["AUTO", "KNOWN", "auto_targets"]
