"""A judge of sentiment that has learned nothing: the word list of VADER."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path


def lexicon_judge(file: Path) -> Callable[[Sequence[str]], list[float]]:
    """VADER's words alone: the sum s of their valences as s / sqrt(s^2 + 15), without its rules for negation and emphasis."""
    valence = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        word, value = line.split("\t")[:2]
        valence[word] = float(value)

    def judge(texts: Sequence[str]) -> list[float]:
        found = []
        for text in texts:
            total = sum(valence.get(word, 0.0) for word in re.findall(r"[a-z']+", text.lower()))
            found.append(total / math.sqrt(total * total + 15))
        return found

    return judge
