"""Where a cell runs: one declaration a placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_ft.engine.strategies import FSDP2Strategy


@dataclass(frozen=True)
class Placement:
    """A strategy and how the base is held.

    Attributes:
        name: in the table and in the key of a cell.
        ranks: how many processes.
        strategy: makes what the Trainer takes.
        model: options of the module.
    """

    name: str
    ranks: int = 1
    strategy: Callable[[], Any] = lambda: "auto"
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def quantised(self) -> bool:
        """Whether the base is held in few bits."""
        return "quantize" in self.model

    def trainer_options(self) -> dict[str, Any]:
        """What the Trainer is given."""
        return {"devices": self.ranks, "strategy": self.strategy()}


PLACEMENTS = {
    placement.name: placement
    for placement in (
        Placement("single"),
        Placement("ddp-2", 2, lambda: "ddp"),
        Placement("fsdp2-2", 2, lambda: FSDP2Strategy(save_distributed_checkpoint=False)),
        Placement("nf4", model={"quantize": "nf4"}),
    )
}

__all__ = ["PLACEMENTS", "Placement"]
