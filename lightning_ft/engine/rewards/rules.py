"""Rewards by rule: a pattern, a form, a length, or a task of ``reasoning-gym`` that can be checked."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from lightning_ft.engine.rewards.guarded import guarded
from lightning_ft.engine.rewards.source import Completions
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.text_rewards import between_tags, overlong, pattern_found, tags_in_order


class RegexReward:
    """1 where a pattern is found in the answer, else 0."""

    def __init__(self, pattern: str, timeout: float) -> None:
        """Args: pattern: of Python's ``re``; timeout: seconds, since some patterns never end."""
        self.timeout = timeout
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise Refusal(f"Reward.regex {pattern!r} is no regular expression: {error}.") from error

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Nothing can be wrong."""

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """1 or 0."""
        return guarded(
            name, lambda some: [pattern_found(text, self.pattern) for text in some.texts], answers, self.timeout
        )


class TagsReward:
    """1 where the answer has the tags, in order and around something, and nothing beside them; else 0."""

    def __init__(self, tags: Sequence[str]) -> None:
        """Args: tags: their names."""
        self.tags = list(tags)
        if not self.tags or len(set(self.tags)) < len(self.tags) or any(re.search(r"[<>/\s]|^$", t) for t in self.tags):
            raise Refusal(f"Reward.tags must be different names without < or >, as [think, answer], got {self.tags!r}.")

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Nothing can be wrong."""

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """1 or 0."""
        return [tags_in_order(text, self.tags) for text in answers.texts]


class LengthReward:
    """0 up to so many tokens, from there falling to -1 at twice as many."""

    def __init__(self, limit: int) -> None:
        """Args: limit: tokens that are free."""
        self.limit = limit

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Nothing can be wrong."""

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """Between -1 and 0."""
        return [overlong(len(ids), self.limit) for ids in answers.ids]


class VerifierReward:
    """What a task of ``reasoning-gym`` says of an answer: 1 for a right one, less for others (see the task)."""

    def __init__(self, task: str, answer_tag: str | None, timeout: float) -> None:
        """Args: task: its name; answer_tag: where the answer stands in the text; timeout: seconds for all answers."""
        self.task = task
        self.answer_tag = answer_tag
        self.timeout = timeout
        self._verify: Callable[..., float] | None = None

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Looks for the task, and for the columns that its verifier reads."""
        _ = self.verify
        missing = [] if columns is None else [c for c in ("answer", "metadata") if c not in columns]
        if missing:
            raise Refusal(
                f"The reward {name} verifies answers to {self.task}, and the data have no column {missing[0]}; take rows that "
                "reasoning-gym has made, with question, answer and metadata."
            )

    @property
    def verify(self) -> Callable[..., float]:
        """The task's own function of (answer, entry)."""
        if self._verify is None:
            try:
                import reasoning_gym
                from reasoning_gym.factory import DATASETS
            except ImportError as error:
                raise Refusal("Reward.verifier needs reasoning-gym: pip install 'lightning-ft[starter]'.") from error
            if self.task not in DATASETS:
                near = difflib.get_close_matches(self.task, DATASETS, n=2)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"there are {len(DATASETS)}, such as chain_sum."
                )
                raise Refusal(f"reasoning-gym has no task {self.task!r}; {hint}")
            self._verify = reasoning_gym.get_score_answer_fn(self.task)
        return self._verify

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """What the task says; 0 where the answer has no such tag."""
        _ = self.verify  # that it is not there is no answer's fault
        return guarded(name, self._call, answers, self.timeout)

    def _call(self, answers: Completions) -> list[float]:
        found = []
        for number, text in enumerate(answers.texts):
            given = text.strip() if self.answer_tag is None else between_tags(text, self.answer_tag)
            entry: dict[str, Any] = {column: values[number] for column, values in answers.columns.items()}
            if isinstance(entry["metadata"], str):  # a table's column has one type, which metadata seldom have
                entry["metadata"] = json.loads(entry["metadata"])
            found.append(0.0 if given is None else float(self.verify(answer=given, entry=entry)))
        return found
