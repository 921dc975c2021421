"""What a quadratic penalty holds parameters to: an importance and a value for each trained number, out of any number of tasks.

Tasks that are kept apart have a term ``F_k (theta - theta*_k)^2`` each. Their sum is one such term around their weighted mean
plus a constant, so that two copies of the trained parameters hold any number of tasks, exactly:

    A' = A + F      c' = c + F / A' (theta* - c)      constant' = constant + sum A F / A' (theta* - c)^2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.engine.gradients import like
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.quadratic_penalty import add_gradient_, penalty


class Anchors:
    """Importances and the values to stay near, by the parameter's name.

    Attributes:
        importance: A, fp32, laid out like the parameters.
        center: c, likewise.
        constant: what the penalty is short of, before ``lam / 2``, where tasks were merged.
        tasks: how many tasks they are made of.
    """

    def __init__(self) -> None:
        self.importance: dict[str, Tensor] = {}
        self.center: dict[str, Tensor] = {}
        self.constant = 0.0
        self.tasks = 0

    def copy(self) -> Anchors:
        """Others that start from the same tensors; `merge` and `move` never write into them."""
        other = Anchors()
        other.importance, other.center = dict(self.importance), dict(self.center)
        other.constant, other.tasks = self.constant, self.tasks
        return other

    @torch.no_grad()
    def merge(self, importance: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Adds a task's own term to those of the tasks before."""
        constant = 0.0
        for name, new in importance.items():
            star = values[name].detach().to(new.dtype, copy=True)
            if name not in self.importance:
                self.importance[name], self.center[name] = new.clone(), star
                continue
            old, away = self.importance[name], star - self.center[name]
            both = old + new
            share = torch.where(both > 0, new / both, torch.ones_like(both))
            constant += _sum(old * share * away * away)
            self.importance[name] = both
            # A number that only the new task needs moves to its value exactly.
            self.center[name] = torch.where(old > 0, self.center[name] + share * away, star)
        self.constant += constant
        self.tasks += 1

    @torch.no_grad()
    def move(self, importance: Mapping[str, Tensor], values: Mapping[str, Tensor], gamma: float) -> None:
        """Lets old importances fade by ``gamma``, adds a task's own, and holds to its values from now on."""
        for name, new in importance.items():
            old = self.importance.get(name)
            self.importance[name] = new.clone() if old is None else gamma * old + new
            self.center[name] = values[name].detach().to(new.dtype, copy=True)
        self.tasks += 1

    @torch.no_grad()
    def add_gradients_(self, parameters: Mapping[str, nn.Parameter], lam: float) -> None:
        """Adds ``lam A (theta - c)`` to the gradient of every parameter."""
        for name, importance in self.importance.items():
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            add_gradient_(parameter.grad, parameter.detach(), self.center[name], importance, lam)

    @torch.no_grad()
    def value(self, parameters: Mapping[str, nn.Parameter], lam: float) -> float:
        """``lam / 2 sum_k sum_i F_ki (theta_i - theta*_ki)^2``; every rank has to ask."""
        terms = [
            penalty(parameters[name].detach(), self.center[name], importance, lam)
            for name, importance in self.importance.items()
        ]
        return sum(_whole(terms)) + 0.5 * lam * self.constant

    def fits(self, parameters: Mapping[str, nn.Parameter], name: str) -> None:
        """Refuses parameters that are not those that it was made for.

        Args:
            parameters: those that are trained now.
            name: of the technique, for the message.

        Raises:
            Refusal: ``EWC holds the values of x.lora_A, which is not trained now; ...``
        """
        if not self.importance:
            return
        for what, missing in (
            ("holds the values of {}, which is not trained now", self.importance.keys() - parameters.keys()),
            ("knows nothing of {}, which is trained now", parameters.keys() - self.importance.keys()),
        ):
            if missing:
                raise Refusal(
                    f"{name} {what.format(sorted(missing)[0])} ({len(missing)} such parameters): what it has measured belongs to "
                    "other trained parts. Train the same parts in every task (freeze, lora with the same targets), or begin "
                    "without its state."
                )
        for key, importance in self.importance.items():
            if importance.shape != parameters[key].shape:
                raise Refusal(
                    f"{name} was measured on {key} of shape {tuple(importance.shape)}, which now has "
                    f"{tuple(parameters[key].shape)}; use the same rank and sizes in every task, or begin without its state."
                )

    def lay_out(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Brings what was loaded to the parameters' device and layout."""
        for tensors in (self.importance, self.center):
            for name, value in tensors.items():
                tensors[name] = like(value, parameters[name])

    def state(self) -> dict[str, Any]:
        """Plain types only, as a checkpoint holds them."""
        if not self.tasks:
            return {}
        return {
            "importance": dict(self.importance),
            "center": dict(self.center),
            "constant": self.constant,
            "tasks": self.tasks,
        }

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Anchors:
        """What `state` gave."""
        anchors = cls()
        if state:
            anchors.importance, anchors.center = dict(state["importance"]), dict(state["center"])
            anchors.constant, anchors.tasks = state["constant"], state["tasks"]
        return anchors


def _sum(value: Tensor) -> float:
    return _whole([value.sum()])[0]


def _whole(values: list[Tensor]) -> list[float]:
    """Sums of tensors, over all ranks where they are sharded."""
    if not values:
        return []
    found: list[float] = torch.stack(
        [(v.full_tensor() if isinstance(v, DTensor) else v).double() for v in values]
    ).tolist()
    return found


__all__ = ["Anchors"]
