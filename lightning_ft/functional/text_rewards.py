"""Rewards that follow from an answer's text or length alone."""

from __future__ import annotations

import re
from collections.abc import Sequence


def pattern_found(text: str, pattern: re.Pattern[str]) -> float:
    """1 where the pattern is found anywhere in the text, else 0."""
    return float(pattern.search(text) is not None)


def tags_in_order(text: str, tags: Sequence[str]) -> float:
    """1 where each tag is opened and closed once, one after the other and around something, with only white space outside.

    Args:
        text: an answer, as ``<think>2 + 2</think> <answer>4</answer>``.
        tags: names in the order wanted, as ``["think", "answer"]``.
    """
    once = all(text.count(mark) == 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>"))
    inner = r"\s*".join(rf"<{re.escape(tag)}>.*\S.*</{re.escape(tag)}>" for tag in tags)
    return float(once and re.fullmatch(rf"\s*{inner}\s*", text, re.DOTALL) is not None)


def overlong(tokens: int, limit: int) -> float:
    """0 up to ``limit`` tokens, from there falling along a line to -1 at twice as many (DAPO's, Yu et al., 2025, equation 13).

    The paper's cache, over which the penalty grows, is here as long as what is free of it.
    """
    return -min(max(tokens - limit, 0) / limit, 1.0)


def between_tags(text: str, tag: str) -> str | None:
    """What the last ``<tag>...</tag>`` of an answer holds, without white space around it; None where there is none."""
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return found[-1].strip() if found else None
