"""One reward as a user writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from annotated_types import Gt

from lightning_ft.engine.arguments import check_arguments
from lightning_ft.engine.rewards.functions import FunctionReward
from lightning_ft.engine.rewards.models import CheckpointReward, ClassifierReward, Reads
from lightning_ft.engine.rewards.rules import LengthReward, RegexReward, TagsReward, VerifierReward
from lightning_ft.engine.rewards.source import RewardSource
from lightning_ft.functional.errors import Refusal

KINDS = ("function", "checkpoint", "classifier", "verifier", "regex", "tags", "length")


@dataclass(frozen=True)
class Reward:
    """Where a reward comes from: exactly one of the first seven, and how much it counts.

    Args:
        function: ``file.py:function`` or ``package.module.function``, in Python also the function itself:
            ``reward(prompts, completions, **columns)`` gets lists (prompts as the data have them, answers as text) and those
            columns of the data that it names, and gives a list of numbers, None for an answer that it does not judge. It may
            also name ``completion_ids`` and ``ended``. One that is ``async def`` is awaited, all of them at once.
        checkpoint: a checkpoint of `RewardModel`.
        classifier: a folder, hub id or starter asset of a classifier in Hugging Face's format; see ``label``.
        verifier: a task of reasoning-gym, such as ``chain_sum``, whose own check of an answer is the reward. The data need
            the columns ``answer`` and ``metadata`` that it makes.
        regex: a pattern of Python's ``re``: 1 where it is found in the answer, else 0.
        tags: names of tags: 1 where the answer is ``<first>...</first> <second>...</second>`` and so on and nothing else, else 0.
        length: tokens that an answer may have for nothing: from there the reward falls from 0 to -1 at twice as many.
        weight: what it is multiplied with before all are added; negative for what is unwanted.
        label: the class whose probability is the reward, of a classifier with several.
        reads: what a classifier is given: the ``answer`` alone, or ``both`` prompt and answer.
        answer_tag: what is verified stands between ``<answer_tag>`` and ``</answer_tag>``, 0 without them; None: the whole answer.
        timeout: seconds that a function, pattern or verifier may take for the answers of a round on one rank.

    Raises:
        Refusal: where it is used, which is where it has a name: none or two sources, a number out of bounds, or a setting that
            the source given does not have.

    Example:
        >>> Reward(length=40, weight=0.1).weight
        0.1
    """

    function: str | Callable[..., Any] | None = None
    checkpoint: str | None = None
    classifier: str | None = None
    verifier: str | None = None
    regex: str | None = None
    tags: list[str] | None = None
    length: Annotated[int, Gt(0)] | None = None
    weight: float = 1.0
    label: str | None = None
    reads: Reads = "answer"
    answer_tag: str | None = None
    timeout: Annotated[float, Gt(0)] = 60.0

    def check(self) -> None:
        """Refuses fields out of bounds, or that do not go together; `Rewards` asks, which knows the name to say."""
        check_arguments(self)
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none"
            raise Refusal(f"a reward comes from one of {', '.join(KINDS)}, {got}; give each an entry of its own.")
        if abs(self.weight) == float("inf") or self.weight != self.weight:
            raise Refusal(f"Reward.weight must be finite, got {self.weight}.")
        kind = given[0]
        for name, default, owner in (
            ("label", None, "classifier"),
            ("reads", "answer", "classifier"),
            ("answer_tag", None, "verifier"),
        ):
            if getattr(self, name) != default and kind != owner:
                raise Refusal(f"Reward.{name} belongs to a {owner}, and this reward is a {kind}; leave it out.")

    def source(self) -> RewardSource:
        """What gives it.

        Raises:
            Refusal: what `check` refuses, or a pattern or tags that are none.
        """
        self.check()
        if self.function is not None:
            return FunctionReward(self.function, self.timeout)
        if self.checkpoint is not None:
            return CheckpointReward(self.checkpoint)
        if self.classifier is not None:
            return ClassifierReward(self.classifier, self.label, self.reads)
        if self.verifier is not None:
            return VerifierReward(self.verifier, self.answer_tag, self.timeout)
        if self.regex is not None:
            return RegexReward(self.regex, self.timeout)
        if self.tags is not None:
            return TagsReward(self.tags)
        assert self.length is not None
        return LengthReward(self.length)

    def plain(self) -> dict[str, Any]:
        """The fields that are given, in plain types, for a checkpoint; a function is named by where it is."""
        defaults = {one.name: one.default for one in fields(self)}
        found = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        if callable(self.function):
            found["function"] = (
                f"{self.function.__module__}.{getattr(self.function, '__qualname__', type(self.function).__name__)}"
            )
        return found


__all__ = ["KINDS", "Reward"]
