"""A judge of sentiment that no model of ours has learned from: VADER's lexicon of 7,500 words that people rated one by one."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "vader_lexicon.txt"
ALPHA = 15.0
"""Of VADER's own normalisation, about the greatest sum of a sentence (Hutto and Gilbert, 2014, and their code)."""


class Lexicon:
    """Word -> valence, from -4 to 4.

    Args:
        file: the lexicon; None: that of the starter asset ``vader``.
    """

    def __init__(self, file: Path | None = None) -> None:
        from lightning_ft.models import starter

        file = file or starter.path("vader") / NAME
        if not file.exists():
            raise SystemExit(
                f"There is no lexicon in {file}: the starter asset was fetched before it held one. Delete that folder and run "
                "`lightning-ft fetch vader`, or name another file with --lexicon."
            )
        text = file.read_text(encoding="utf-8")
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        self.valence = {row[0].lower(): float(row[1]) for row in rows}

    def score(self, text: str) -> float:
        """s / sqrt(s^2 + 15), from -1 to 1, of the sum s of a text's valences; without its rules for negation and degree."""
        total = 0.0
        for token in text.lower().split():
            bare = token.strip("\"'.,;:!?()[]*-")
            total += self.valence.get(token, self.valence.get(bare, 0.0))
        return float(total / (total * total + ALPHA) ** 0.5)


__all__ = ["NAME", "Lexicon"]
