"""All rewards of a run: each source asked, checked, weighted and added."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ft.engine.rewards.functions import FunctionReward
from lightning_ft.engine.rewards.reward import Reward
from lightning_ft.engine.rewards.source import Completions, RewardSource
from lightning_ft.engine.rewards.waiting import AtOnce
from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class Scores:
    """What S answers got.

    Attributes:
        total: (S,) float64, weighted and added; NaN where no source judged the answer.
        each: name -> (S,) float64 before weighting; NaN where that source did not judge.
    """

    total: Tensor
    each: dict[str, Tensor]


class Rewards:
    """Named rewards with weights; models among them are loaded when they are first asked."""

    def __init__(
        self, given: Mapping[str, Reward | Mapping[str, Any] | Callable[..., Any]], *, optional: bool = False
    ) -> None:
        """Set them up.

        Args:
            given: by name: a `Reward`, its fields, or a function.
            optional: whether there may be none, so that no answer is judged.

        Raises:
            Refusal: none at all, a name that a logged metric cannot have, or one that is no reward.
        """
        if not isinstance(given, Mapping) or not (given or optional):
            raise Refusal(
                "rewards must name at least one reward, as {short: {length: 40}}; see docs/guides/rewards.md for the kinds."
            )
        self.given: dict[str, Reward] = {}
        self.sources: dict[str, RewardSource] = {}
        for name, one in given.items():
            if not isinstance(name, str) or not name.isidentifier() or name in ("total", "kl"):
                raise Refusal(f"A reward is named by a word that is not total or kl, got {name!r}.")
            try:
                self.given[name] = _reward(one)
                self.sources[name] = self.given[name].source()
            except Refusal as refusal:
                raise Refusal(f"The reward {name}: {refusal}") from refusal

    def plain(self) -> dict[str, Any]:
        """What builds it again, in plain types."""
        return {name: one.plain() for name, one in self.given.items()}

    def check(self, columns: Collection[str] | None = None) -> None:
        """Refuses what cannot work before any model is loaded.

        Args:
            columns: of the data; None where they are not known.
        """
        for name, source in self.sources.items():
            source.check(name, columns)

    def score(self, answers: Completions, device: torch.device | str = "cpu") -> Scores:
        """Rewards of the answers of this rank; all ranks must call it, and if one fails all are told.

        Functions that are ``async def`` are asked first, all at once, and the others meanwhile.

        Args:
            answers: none is allowed.
            device: where models are run.

        Raises:
            Refusal: what failed, at which answer.
        """
        problem: str | None = None
        each: dict[str, Tensor] = {}
        try:
            found = self._asked(answers, torch.device(device)) if len(answers) else {}
            for name in self.sources:
                numbers = [float("nan") if value is None else value for value in found.get(name, [])]
                each[name] = torch.tensor(numbers, dtype=torch.float64)
        except Refusal as refusal:
            if not _several_ranks():
                raise
            problem = str(refusal)
        problem = _first(problem)
        if problem is not None:
            raise Refusal(problem)
        if not each:
            return Scores(torch.full((len(answers),), torch.nan, dtype=torch.float64), each)
        weighted = torch.stack([self.given[name].weight * value for name, value in each.items()])  # (K, S)
        nobody = weighted.isnan().all(0)
        return Scores(weighted.nansum(0).masked_fill(nobody, torch.nan), each)

    def _asked(self, answers: Completions, device: torch.device) -> dict[str, list[float | None]]:
        waiting = {name: s for name, s in self.sources.items() if isinstance(s, FunctionReward) and s.waits}
        begun = AtOnce({name: (source.ask(answers), source.timeout) for name, source in waiting.items()})
        found = {name: s.score(name, answers, device) for name, s in self.sources.items() if name not in waiting}
        for name, source in waiting.items():
            found[name] = source.score(name, answers, device, begun.outcome(name))
        return found


def _reward(one: Reward | Mapping[str, Any] | Callable[..., Any]) -> Reward:
    if isinstance(one, Reward):
        return one
    if isinstance(one, Mapping):
        known = [field.name for field in fields(Reward)]
        unknown = next((str(key) for key in one if key not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see lightning_ft.Reward."
            raise Refusal(f"there is no field {unknown}; {hint}")
        return Reward(**one)
    if callable(one):
        return Reward(function=one)
    raise Refusal(f"it must be a Reward, its fields or a function, got {one!r}.")


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first(problem: str | None) -> str | None:
    """The first problem of any rank, on all of them."""
    if not _several_ranks():
        return problem
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((one for one in found if one is not None), None)
