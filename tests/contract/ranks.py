"""Counts: eight rows are four twice accumulated are two ranks of four, in loss and gradients, with uneven counts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.contract.case import Case, Check, Place, collect, require
from tests.contract.subjects import Steps, chat_job, trainer
from tests.tolerances import TOL

CHECKS: list[Check] = []
check = collect(CHECKS)


@check(two_ranks=True)
def counts(case: Case, place: Place) -> None:
    """Loss and gradients of two windows of eight rows, however the rows are dealt."""
    path = f"{case.cls.__module__}:{case.cls.__qualname__}"
    job = {"path": path, "arguments": case.small, "chat": str(place.chat), "folder": str(place.folder)}
    whole = train(**job, batch_size=8)
    require(len(set(whole["tokens"])) > 1, "The rows of the chat have even counts, which would prove nothing.")
    ranks = place.two_ranks.run("tests.contract.ranks:train", **job, batch_size=4, devices=2)
    require(len(ranks) == 2 and [r["world_size"] for r in ranks] == [2, 2], f"Fewer than two processes: {ranks}.")
    others = {"4 rows twice": train(**job, batch_size=4, accumulate=2), "rank 0": ranks[0], "rank 1": ranks[1]}
    require(len(whole["losses"]) == 2 and all(whole["gradients"]), f"Two steps with {case.name} had no gradients.")
    for dealt, other in others.items():
        for what in ("losses", "gradients"):
            torch.testing.assert_close(
                other[what],
                whole[what],
                rtol=TOL[torch.float32],
                atol=TOL[torch.float32],
                msg=lambda text, what=what, dealt=dealt: (
                    f"With {case.name}, the {what} of 8 rows are others when they are dealt as {dealt}: {text}"
                ),
            )


def train(
    path: str,
    arguments: dict[str, Any],
    chat: str,
    folder: str,
    *,
    batch_size: int,
    accumulate: int = 1,
    devices: int = 1,
) -> dict[str, Any]:
    """Two windows of SFT on the tiny chat model: the logged losses, and the gradients of both."""
    steps = Steps()
    file, _, name = path.partition(":")
    cls = getattr(import_module(file), name)
    technique, where = cls(**arguments), Path(folder) / f"{batch_size}-{accumulate}-{devices}"
    module, data = chat_job(Path(chat), where, cls.traits.needs, data={"batch_size": batch_size})
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_steps": 2, "use_distributed_sampler": False}
    if devices > 1:
        options |= {"devices": devices, "strategy": "ddp"}
    run = trainer(Path(folder), technique, steps, **options)
    run.fit(module, data)
    tokens = [batch.counts["token"] for batch in steps.batches]
    return {"losses": steps.losses, "gradients": steps.gradients, "tokens": tokens, "world_size": run.world_size}
