r"""Which modules or parameters a list of patterns means; a pattern that means nothing is refused, never ignored.

One pattern is one of
- an exact name, ``model.layers.0.self_attn.q_proj``;
- the end of a name at a dot, ``q_proj`` or ``self_attn.q_proj``;
- a glob over the whole name, ``model.layers.*.mlp.*``, in which ``*`` also crosses dots;
- a regular expression that matches the whole name, ``re:.*layers\.[0-3]\..*``.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost, pristine_modules

ALL_LINEAR = "all-linear"
LayerSpec = str | Sequence[int]


def select(
    names: Iterable[str],
    patterns: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    layers: LayerSpec | None = None,
) -> list[str]:
    """Return the names that any pattern means, in their own order.

    Args:
        names: All names there are.
        patterns: One pattern or several. Each must match at least one name.
        exclude: Patterns of names to leave out. Each must match at least one name, so that a misspelt one is noticed.
        layers: Only names inside these repeated blocks: ``"0-3,7"`` (both ends included), ``"-4:"`` (the last four),
            or a list of indices; None for no restriction. See `layer_index`.

    Raises:
        Refusal: For a pattern without a match, with the nearest names; for layers that do not exist.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in _as_tuple(patterns):
        chosen.update(_matches(names, pattern))
    for pattern in _as_tuple(exclude):
        chosen.difference_update(_matches(names, pattern))
    if layers is not None:
        wanted, sizes = _layer_indices(names, layers), block_lists(names)
        chosen = {n for n in chosen if (at := layer_index(n, sizes)) is not None and at[1] in wanted[at[0]]}
        if not chosen:
            raise Refusal(
                f"Nothing that {_shown(patterns)} selects lies inside layers {layers!r}; change layers or the pattern."
            )
    return [name for name in names if name in chosen]


def matches(name: str, pattern: str) -> bool:
    """Say whether one pattern means one name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def is_broad(pattern: str) -> bool:
    """Say whether a pattern is a glob or a regular expression, which may also cross modules that are not meant."""
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


def linear_names(model: nn.Module) -> list[str]:
    """Return what ``all-linear`` means: each linear layer (``nn.Linear``, also in 4 bits, and GPT-2's ``Conv1D``).

    The output head of a Hugging Face model is left out, be it of a language model or of a classifier, with a pooler that
    is as new; so is the projection inside ``nn.MultiheadAttention``, whose weight is read without the layer being called.
    """
    head = _head(model)
    return [
        name
        for name, (_, module) in pristine_modules(model).items()
        if is_linear(innermost(module)) and innermost(module) not in head and not is_called_by_weight(innermost(module))
    ]


#: A module that carries this attribute as True is new and trained in full, whatever else is.
NEW = "lightning_ft_new"


def _head(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a Hugging Face model's head, wrappers taken off."""
    head_of = getattr(model, "get_output_embeddings", None)
    last = head_of() if callable(head_of) else None
    found = {module for module in model.modules() if getattr(innermost(module), NEW, False)}
    if last is not None:
        found.add(innermost(last))
    body = getattr(model, "base_model", None)
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")) and body is not model:
        found |= {module for child in model.children() if child is not body for module in child.modules()}
    return {innermost(module) for module in found}


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer, also GPT-2's ``Conv1D``, known by its class's name."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is transformers' ``Conv1D``: a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_called_by_weight(module: nn.Module) -> bool:
    """Say whether PyTorch reads this layer's weight instead of calling it, so that a wrapper would have no effect."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def block_lists(names: Iterable[str]) -> dict[str, int]:
    """Return the lists of repeated blocks found in names: ``{"model.layers": 30}``, its name and length.

    A list counts when it holds at least two blocks; if none does, those with one block count.
    """
    sizes: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                prefix = ".".join(parts[:i])
                sizes[prefix] = max(sizes.get(prefix, 0), int(part) + 1)
    return {prefix: size for prefix, size in sizes.items() if size > 1} or sizes


def layer_index(name: str, sizes: dict[str, int]) -> tuple[str, int] | None:
    """Return (block list, index) of the outermost repeated block that a name lies in, None outside all of them.

    Args:
        name: A module's or parameter's name.
        sizes: What `block_lists` gives for all names.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and ".".join(parts[:i]) in sizes:
            return ".".join(parts[:i]), int(part)
    return None


def _layer_indices(names: list[str], layers: LayerSpec) -> dict[str, set[int]]:
    """Return per block list the indices that a layer specification means; each index must exist in some list."""
    sizes = block_lists(names)
    outer = {at[0] for name in names if (at := layer_index(name, sizes)) is not None}
    if not outer:
        raise Refusal(f"layers={layers!r} cannot be used here: no name holds a numbered block; leave layers out.")
    wanted: dict[str, set[int]] = {prefix: set() for prefix in sizes}
    for piece in layers.split(",") if isinstance(layers, str) else [str(i) for i in layers]:
        hit = False
        for prefix in outer:
            found = _piece_indices(piece.strip(), sizes[prefix], layers)
            wanted[prefix] |= found
            hit = hit or bool(found)
        if not hit:
            largest = max(sizes[prefix] for prefix in outer)
            raise Refusal(f"layers={layers!r}: {piece!r} names no layer; the model has layers 0 to {largest - 1}.")
    return wanted


def _piece_indices(piece: str, size: int, layers: LayerSpec) -> set[int]:
    """Return the indices below ``size`` that one piece of a layer specification means."""
    if match := re.fullmatch(r"(-?\d*):(-?\d*)", piece):
        start, stop = (int(x) if x else None for x in match.groups())
        return set(range(size)[start:stop])
    if match := re.fullmatch(r"(\d+)-(\d+)", piece):
        start, stop = int(match[1]), int(match[2])
        return set(range(start, stop + 1)) if start <= stop < size else set()
    if re.fullmatch(r"-?\d+", piece):
        index = int(piece)
        return {index % size} if -size <= index < size else set()
    raise Refusal(f"layers={layers!r}: {piece!r} is not a layer; write '0-3,7', '-4:' or a list of indices.")


def _matches(names: list[str], pattern: str) -> list[str]:
    """Return the names that one pattern means, or refuse with the nearest ones."""
    try:
        found = [name for name in names if matches(name, pattern)]
    except re.error as error:
        raise Refusal(f"The pattern {pattern!r} is not a regular expression: {error}.") from error
    if found:
        return found
    if "," in pattern and not is_broad(pattern):
        raise Refusal(f"The pattern {pattern!r} matches nothing: several names are a list, {pattern.split(',')}.")
    ends = dict.fromkeys(".".join(name.split(".")[-1 - pattern.count(".") :]) for name in names if name)
    near = difflib.get_close_matches(pattern, ends, n=3, cutoff=0.5) or list(ends)[-3:]
    raise Refusal(f"The pattern {pattern!r} matches nothing in this model; the nearest names are {', '.join(near)}.")


def _as_tuple(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _shown(patterns: str | Iterable[str]) -> str:
    return ", ".join(repr(p) for p in _as_tuple(patterns))
