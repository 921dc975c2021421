"""What the reference says of the pairs among a batch's rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.batch_part import part_of
from lightning_ft.engine.scoring import segment_logps
from lightning_ft.engine.task_adapters import TaskAdapters
from lightning_ft.models.admission import evaluating


def reference_logps(module: Any, batch: Batch, here: Mapping[str, Tensor], adapters: TaskAdapters) -> Tensor:
    """Log-probability of each row of some tasks by the model as the fit began, 0 of other rows.

    To be asked before the policy's own pass, whose activations should see no weights change.

    Args:
        module: with ``model`` and ``view``.
        batch: packed or padded rows.
        here: name of each of these tasks -> which rows are its.
        adapters: of single tasks, which compute on their rows.

    Returns:
        (S,), without a gradient.
    """
    mine = sorted(row for rows in here.values() for row in rows.tolist())
    found = torch.zeros(len(batch.rows), device=batch.ids.device)
    if not mine and (module._trainer is None or module.trainer.world_size == 1):
        return found
    # Sharded blocks are gathered by all ranks together, so that one without pairs reads a row, too.
    part, places = part_of(batch, mine or [0]), torch.tensor(mine, dtype=torch.long, device=found.device)
    adapters.choose(part, {name: torch.searchsorted(places, rows) for name, rows in here.items()})
    with Attachment.of(module).reference("start"), evaluating(module.model):
        logps, _ = segment_logps(module.view, part)
    return found.index_copy(0, places, logps) if mine else found


__all__ = ["reference_logps"]
