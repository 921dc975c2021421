"""What a process does of a cell: three steps with a checkpoint at each, and the third step again from the second's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import evaluating
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import QUIET
from tests.matrix.parts import EXTRAS, PARTS
from tests.matrix.placements import PLACEMENTS
from tests.matrix.subjects import SUBJECTS

STEPS = 3


class Watch(pl.Callback):
    """What stood where at the start, what got a gradient, and what the trained model says of its first batch.

    Args:
        says: what a module says of a batch.
    """

    def __init__(self, says: Callable[[Any, Any], dict[str, Any]]) -> None:
        self.says = says

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = {name: _own(p).clone() for name, p in pl_module.named_parameters()}
        self.trained = trained_names(pl_module)
        self.slope: dict[str, float] = {}
        self.batch: Any = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                here = _own(parameter.grad)  # a rank may own no row of a small parameter
                steepest = float(here.abs().max()) if here.numel() else 0.0
                self.slope[name] = max(self.slope.get(name, 0.0), steepest)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch if self.batch is None else self.batch

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with Attachment.of(pl_module).evaluated(), evaluating(pl_module), torch.no_grad():
            self.said = plain(self.says(pl_module, self.batch))


def run(
    part: str,
    subject: str,
    placement: str,
    ground: str,
    folder: str,
    *,
    checkpointing: bool = False,
    packing: bool = False,
    extra: str | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """All that is to be known of a cell's run; both ranks of a pair call it.

    Returns:
        ``refused`` with the sentence and the steps made until then; or what `tests.matrix.checks` looks at.
    """
    torch.set_num_threads(1)
    options = (part, subject, placement, ground)
    more: dict[str, Any] = {"checkpointing": checkpointing, "packing": packing, "extra": extra}
    watch = Watch(SUBJECTS[subject].says)
    saver = ModelCheckpoint(Path(folder), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, trainer, rows = prepare(*options, Path(folder), watch, saver, **more)
    try:
        trainer.fit(module, rows)
    except Refusal as refusal:
        return {"refused": str(refusal), "steps": trainer.global_step}
    found = seen(module, watch)
    found |= {"steps": trainer.global_step, "logged": sorted(trainer.logged_metrics)}
    if resume:
        module, trainer, rows = prepare(*options, Path(folder) / "resumed", **more)
        trainer.fit(module, rows, ckpt_path=Path(folder) / f"step={STEPS - 1}.ckpt", weights_only=True)
        found["resumed"] = trained(module)
    return found


def prepare(
    part: str,
    subject: str,
    placement: str,
    ground: str,
    folder: Path,
    *callbacks: pl.Callback,
    checkpointing: bool,
    packing: bool,
    extra: str | None,
) -> tuple[Any, pl.Trainer, Any]:
    """(module, Trainer, data) of a cell."""
    where = PLACEMENTS[placement]
    recomputed = {"gradient_checkpointing": checkpointing} if SUBJECTS[subject].recomputes else {}
    model = {**where.model, **recomputed}
    module, rows = SUBJECTS[subject].job(Path(ground), ranks=where.ranks, packing=packing, model=model)
    techniques = PARTS[part].build() + (EXTRAS[extra].build(SUBJECTS[subject], Path(ground)) if extra else [])
    options: dict[str, Any] = {
        **QUIET,
        **where.trainer_options(),
        "max_steps": STEPS,
        "default_root_dir": str(folder),
        "enable_checkpointing": bool(callbacks),
        "limit_val_batches": 1 if extra else 0,
        "use_distributed_sampler": False,
        "callbacks": [*techniques, *callbacks],
    }
    return module, pl.Trainer(**options), rows


def seen(module: Any, watch: Watch) -> dict[str, Any]:
    """What a run has left, as plain tensors."""
    now = {name: _own(p) for name, p in module.named_parameters()}
    moved = {name for name, value in now.items() if not _equal(value, watch.start.get(name))}
    return {
        "frozen": sorted(set(now) - watch.trained),
        "moved": sorted(moved),
        "slope": watch.slope,
        "injected": sorted(
            f"{path}.{name}" for path, layer in injected_layers(module).items() for name in layer.injected_parameters()
        ),
        "trained": trained(module),
        "values": {name: _whole(p) for name, p in module.named_parameters() if name not in watch.trained},
        "batch": watch.batch,
        "said": watch.said,
    }


def trained_names(module: Any) -> set[str]:
    """Of what trains or will be thawed; where a start is kept beside it, as PiSSA's is, that is no part of it."""
    late = Attachment.of(module).late
    return {name for name, p in module.named_parameters() if p.requires_grad or name in late}


def trained(module: Any) -> dict[str, Tensor]:
    """What trained, gathered from all ranks."""
    names = trained_names(module)
    return {name: _whole(p) for name, p in module.named_parameters() if name in names}


def plain(said: dict[str, Any]) -> dict[str, Any]:
    """A prediction without what hangs on it."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in said.items()}


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)
