"""``--trainer.strategy``: names that cannot work are refused before Lightning looks for their GPUs and packages."""

from __future__ import annotations

from typing import Any

from lightning_ft.engine import compatibility


def strategy_of(given: Any, *, ours: bool) -> Any:
    """What the Trainer is to be given for a strategy: ``fsdp2`` is this library's `FSDP2Strategy`, others stay.

    Args:
        given: a name or a strategy.
        ours: whether the module or a callback is this library's; without any, a run is plain Lightning.

    Raises:
        Refusal: for what no part of this library works with, whatever else is wrong with it on this machine.
    """
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    name = given if isinstance(given, str) else ""
    if name == "fsdp2":
        from lightning_ft.engine.strategies import FSDP2Strategy

        return FSDP2Strategy()
    if not ours:
        return given
    words = set()
    if name.startswith("deepspeed") or isinstance(given, DeepSpeedStrategy):
        words.add("deepspeed")
    if name in ("fsdp", "fsdp_cpu_offload") or isinstance(given, FSDPStrategy):
        words.add("fsdp1")
    if name.startswith("ddp_") and any(start in name for start in ("spawn", "fork", "notebook")):
        words.add("spawn")
    compatibility.check([], compatibility.Situation(frozenset(words)))
    return given
