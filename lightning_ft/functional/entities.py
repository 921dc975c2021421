"""Entities in a row of tags such as ``B-PER I-PER O``: what a tagger has found, as spans.

The reading is the one of the CoNLL evaluation script: an entity begins at B, or at I after another type or after O.
"""

from __future__ import annotations

from collections.abc import Sequence


def is_tagging(names: Sequence[str]) -> bool:
    """Whether class names mark entities: all are ``O``, ``B-...`` or ``I-...``, and some entity begins."""
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names) and len(names) > 1


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, start, end) of each entity, the end exclusive.

    Args:
        tags: of one row, in order.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC"]))
        [('LOC', 3, 4), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    kind, begin = None, 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and (prefix != "I" or name != kind):
            found.add((kind, begin, place))
            kind = None
        if prefix != "O" and kind is None:
            kind, begin = name, place
    return found
