"""All rewards of a run: each source asked, checked, weighted and added."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ft.engine.rewards.reward import Reward
from lightning_ft.engine.rewards.source import Completions
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
        for name, one in given.items():
            if not isinstance(name, str) or not name.isidentifier() or name in ("total", "kl"):
                raise Refusal(f"A reward is named by a word that is not total or kl, got {name!r}.")
            self.given[name] = _reward(name, one)
        self.sources = {name: one.source() for name, one in self.given.items()}

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

        Args:
            answers: none is allowed.
            device: where models are run.

        Raises:
            Refusal: what failed, at which answer.
        """
        problem: str | None = None
        each: dict[str, Tensor] = {}
        try:
            for name, source in self.sources.items():
                found = source.score(name, answers, torch.device(device)) if len(answers) else []
                numbers = [float("nan") if value is None else value for value in found]
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


def _reward(name: str, one: Reward | Mapping[str, Any] | Callable[..., Any]) -> Reward:
    if isinstance(one, Reward):
        return one
    try:
        if isinstance(one, Mapping):
            return Reward(**one)
    except TypeError as error:
        unknown = str(error).rpartition("argument ")[2].strip("'")
        raise Refusal(f"The reward {name} has no field {unknown}; see lightning_ft.Reward.") from error
    if callable(one):
        return Reward(function=one)
    raise Refusal(f"The reward {name} must be a Reward, its fields or a function, got {one!r}.")


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first(problem: str | None) -> str | None:
    """The first problem of any rank, on all of them."""
    if not _several_ranks():
        return problem
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((one for one in found if one is not None), None)
