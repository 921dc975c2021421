"""Averaged gradient episodic memory: no step may raise the loss on rows of earlier tasks, to first order."""

from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from annotated_types import Ge
from torch import Tensor, nn

from lightning_ft.data.rehearsal import Rehearsal
from lightning_ft.data.replay_memory import Balance
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.tasks import task_of
from lightning_ft.engine.traits import ROWS_ALONE, Cannot, Traits
from lightning_ft.functional.gradient_projection import dot, project_


class AGEM(Rehearsal):
    """Keeps rows of earlier tasks, and takes from every step the part of its gradient that would raise the loss on them.

    With g the gradient of the step (accumulated, over all ranks) and g_ref that of the module's own loss on rows of earlier tasks:
    ``g <- g - (g . g_ref) / (g_ref . g_ref) g_ref`` where ``g . g_ref < 0``. Then clipping, and penalties of other techniques come
    after it. Of a stream, rows of the present task are kept but not yet used; without one, or where tasks are not told, all rows
    seen before are earlier ones.

    Args:
        size: rows in memory, over all ranks, an equal share for each task.
        rows: of earlier tasks, drawn anew for each step, over all ranks; None: as many as a step trains.
        name: tells two of them apart, and names what is logged.

    Logs:
        ``train/agem``, 1 for a step that was projected, else 0: its mean is the share of such steps.

    Cost: one more forward and backward pass over ``rows`` rows a step, a second gradient in memory, and the rows.

    Raises:
        Refusal: at setup under FSDP2, with fp16 gradient scaling and where gradients cannot be edited; in the first step for rows
            that cannot be kept alone.

    Differs from: the paper, whose memory has the last rows of each task where this one has a uniform sample.

    Example:
        >>> AGEM(200)
        AGEM(size=200)

    References:
        Chaudhry et al., 2019 (A-GEM), equation 11. Proven against the formula, by g . g_ref >= 0, and on two ranks,
            in tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="agem",
        edits=frozenset({"gradients"}),
        continual=True,
        cannot=(
            Cannot("fsdp2", "its second gradient is taken outside FSDP2's passes", "use ddp"),
            Cannot("fp16", "it compares gradients that may still be scaled", "use bf16-mixed or 32-true"),
            *ROWS_ALONE,
        ),
    )

    balance: Balance = "task"

    def __init__(
        self,
        size: Annotated[int, Ge(1)] = 500,
        *,
        rows: Annotated[int, Ge(1)] | None = None,
        name: str = "agem",
    ) -> None:
        self.size = size
        self.rows = rows
        self.name = name
        super().__init__()
        self._batch: tuple[Any, int] | None = None
        self._projected = 0.0
        self.check()

    def register(self, attachment: Attachment) -> None:
        """Edits gradients before any penalty does."""
        self._attachment = attachment
        attachment.gradient_edit(self, first=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remembers what is trained."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch = (batch, batch_idx)

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        """Projects the gradient of the step."""
        memory, attachment = self._memory, self._attachment
        assert memory is not None and attachment is not None and self._batch is not None
        trainer, (batch, batch_idx) = attachment.trainer, self._batch
        task = task_of(trainer)
        self._projected = 0.0
        drawn = memory.draw(trainer, batch, self.rows, without=task.name if task is not None else None)
        if not drawn:
            return
        there = [p for p in parameters.values() if p.grad is not None]
        mine = drawn[trainer.global_rank :: trainer.world_size]
        g_ref = self._gradient(trainer, mine or drawn[:1], bool(mine), drawn, there, batch, batch_idx)
        g = [p.grad for p in there if p.grad is not None]
        self._projected = float(project_(g, g_ref, dot(g, g_ref), dot(g_ref, g_ref)) != 0.0)

    def _gradient(
        self,
        trainer: pl.Trainer,
        mine: list[Any],
        counts: bool,
        drawn: list[Any],
        parameters: list[nn.Parameter],
        batch: Any,
        batch_idx: int,
    ) -> list[Tensor]:
        """Of the mean loss over all drawn rows; each rank adds its own rows."""
        attachment = self._attachment
        assert attachment is not None
        made = self._again(trainer, batch, mine, drawn)
        totals = made.window or {} if isinstance(made, Batch) else {}
        with torch.enable_grad(), trainer.precision_plugin.forward_context():
            terms = attachment.rerun(made, batch_idx)
            losses = [
                term.weight * term.sum * (len(mine) / len(drawn) if term.unit == "mean" else 1 / totals[term.unit])
                for term in terms
                if term.unit == "mean" or totals[term.unit]
            ]
            loss = torch.stack(losses).sum() * float(counts)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [torch.zeros_like(p) if one is None else one for one, p in zip(grads, parameters, strict=True)]
        if trainer.world_size > 1:
            flat = torch.cat([one.reshape(-1).float() for one in found])
            dist.all_reduce(flat)
            pieces = flat.split([one.numel() for one in found])
            found = [piece.view_as(one) for piece, one in zip(pieces, found, strict=True)]
        return found

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs whether the step was projected, where a window is complete, and offers its rows to the memory."""
        if self._attachment is not None and not trainer.fit_loop.epoch_loop._should_accumulate():
            pl_module.log(f"train/{self.name}", self._projected, sync_dist=trainer.world_size > 1)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets the last batch go; the memory stays for a next fit."""
        super().teardown(trainer, pl_module, stage)
        self._batch = None


__all__ = ["AGEM"]
