"""``rollouts.jsonl``: some answers of each round with their rewards, a line each, to be read by people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_ft.engine.rollouts.round import Round
from lightning_ft.formats.atomic import write_text


class AnswerLog:
    """Writes the file round by round; its cost is that of the new lines.

    A run that resumes writes rounds again that a killed one has written already: they are the same, and stand there once.
    """

    def __init__(self) -> None:
        self._file: Path | None = None

    def write(self, file: Path, round: Round, most: int) -> None:
        """Adds the first answers of a round.

        Args:
            file: where; it begins anew with round 0.
            round: with its rewards.
            most: answers.
        """
        if file != self._file:
            write_text(file, "".join(f"{line}\n" for line in _before(file, round.number)))
            self._file = file
        lines = [json.dumps(one, ensure_ascii=False) for one in _described(round, most)]
        with file.open("a", encoding="utf-8") as opened:
            opened.write("".join(f"{line}\n" for line in lines))


def _before(file: Path, number: int) -> list[str]:
    """Lines of earlier rounds; a last one without its end is the half of one, left by a run that was killed in writing it."""
    if number == 0 or not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0].decode("utf-8")
    return [line for line in whole.split("\n") if line and json.loads(line)["round"] < number]


def _described(round: Round, most: int) -> list[dict[str, Any]]:
    totals = round.scores.total.tolist()
    return [
        {
            "round": round.number,
            "prompt": round.prompts[answer // round.samples].given,
            "answer": round.texts[answer],
            "ended": round.answers[answer].ended,
            "reward": totals[answer] if totals[answer] == totals[answer] else None,
        }
        for answer in range(min(most, len(round.answers)))
    ]
