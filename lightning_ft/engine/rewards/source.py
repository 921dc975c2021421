"""What is rewarded, and what a source of rewards is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Completions:
    """S answers that were drawn.

    Attributes:
        prompts: what each answers, as the data have it: a string, or a list of messages.
        texts: the answers without what ended them.
        prompt_ids: token ids of each prompt, as the model read it.
        ids: token ids of each answer, with the one that ended it.
        ended: whether each ended by itself; False where the limit of tokens cut it.
        rows: number of each prompt's row in the data.
        columns: further columns of those rows.
        tokenizer: of the model that wrote them.
    """

    prompts: Sequence[str | list[dict[str, Any]]]
    texts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    ids: Sequence[Sequence[int]]
    ended: Sequence[bool]
    rows: Sequence[int]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tokenizer: Any = None

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, number: int) -> Completions:
        """One answer alone."""
        at = slice(number, number + 1)
        columns = {name: values[at] for name, values in self.columns.items()}
        return Completions(
            self.prompts[at], self.texts[at], self.prompt_ids[at], self.ids[at], self.ended[at], self.rows[at], columns,
            self.tokenizer,
        )  # fmt: skip

    def said(self, number: int) -> str:
        """Which answer is meant, for people."""
        return described(self.texts[number], self.prompts[number], self.rows[number])


class RewardSource(Protocol):
    """Gives each answer a number."""

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Refuses what cannot work, before any model is loaded.

        Args:
            name: of the reward, for messages.
            columns: of the data; None where they are not known.
        """

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """(S) finite numbers; None for an answer that it does not judge.

        Raises:
            Refusal: naming the answer that it failed at.
        """


def described(text: str, prompt: str | list[dict[str, Any]], row: int) -> str:
    """Which answer is meant, for people.

    Args:
        text: of the answer.
        prompt: as the data have it.
        row: of the prompt.
    """
    if not isinstance(prompt, str):
        prompt = str(prompt[-1].get("content", "")) if prompt else ""
    return f"the answer {_short(text)} to {_short(prompt)} (row {row} of the data)"


def finite(name: str, given: Any, answers: Completions) -> list[float | None]:
    """What a source gave, as plain numbers.

    Raises:
        Refusal: another number of rewards than of answers; something else than a finite number or None.
    """
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, (list, tuple)) or len(given) != len(answers):
        got = f"{len(given)} rewards" if isinstance(given, (list, tuple)) else type(given).__name__
        raise Refusal(
            f"The reward {name} gave {got} for {len(answers)} answers; it must give a list with one for each."
        )
    found: list[float | None] = []
    for number, value in enumerate(given):
        try:
            plain = None if value is None else float(value)
        except (TypeError, ValueError):
            plain = float("nan")
        if plain is not None and not abs(plain) < float("inf"):
            raise Refusal(
                f"The reward {name} gave {value!r} for {answers.said(number)}; a reward is a finite number, or None for an "
                "answer that it does not judge."
            )
        found.append(plain)
    return found


def _short(text: str, most: int = 60) -> str:
    one_line = " ".join(text.split())
    return repr(one_line if len(one_line) <= most else one_line[: most - 3] + "...")
