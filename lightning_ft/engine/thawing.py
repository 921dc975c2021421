"""Freezing with a plan to thaw: parameters that begin frozen and train once their phase is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_ft.engine import freezing
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.root import model_root
from lightning_ft.engine.unfreezing_schedule import Phase
from lightning_ft.engine.wrappers import replace_on
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import is_packed


class Thawing:
    """One technique's phases: the model edits that freeze what they name, then their parameters while a run trains."""

    def __init__(self, phases: Callable[[nn.Module], list[Phase]], *, spare_frozen: bool) -> None:
        """Stores.

        Args:
            phases: what starts to train when, given the model that names are relative to.
            spare_frozen: whether what the module itself has frozen stays so, unless it is to train from 0 on.
        """
        self.phases = phases
        self.spare_frozen = spare_frozen
        self._forget()

    def _forget(self) -> None:
        self._frozen_before: set[int] = set()  # identities, while the model is edited
        self._trained_at_once: set[int] = set()
        self._late: list[nn.Parameter] = []
        self._plan: list[tuple[Phase, list[nn.Parameter]]] | None = None
        self.parts: list[tuple[Phase, dict[int, nn.Parameter]]] = []  # while a run trains

    # -- the model edits ----------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment, name: str) -> None:
        """Freezes all but what trains at once, and tells the attachment what will be thawed."""
        steps: dict[int, Callable[[pl.LightningModule], None]] = {
            freezing.BEFORE: self._note_frozen,
            freezing.FREEZE_REST: lambda module: freezing.freeze_base(model_root(module)[1]),
            freezing.THAW: self._thaw_first,
            freezing.NOTE: self._note_first,
            freezing.RAISE: self._raise,
            freezing.READ: self._read,
            freezing.LOWER: self._lower,
        }
        for order, step in steps.items():
            attachment.edit("freeze", f"unfreezing:{name}:{order}", step, order=order)
        attachment.edit("inject", f"unfreezing:{name}", self._tell, order=9)  # names as they are then

    def _planned(self, module: pl.LightningModule) -> list[tuple[Phase, list[nn.Parameter]]]:
        """Each phase with its parameters; kept while edits follow one another, since names take time in a deep model."""
        if self._plan is None:
            root = model_root(module)[1]
            named = [(phase, freezing.parameters_named(root, phase.train)) for phase in self.phases(root)]
            self._plan = [(phase, list(parameters.values())) for phase, parameters in named]
        return self._plan

    def _note_frozen(self, module: pl.LightningModule) -> None:
        if self.spare_frozen:
            self._frozen_before = {id(p) for p in module.parameters() if not p.requires_grad}

    def _thaw_first(self, module: pl.LightningModule) -> None:
        for phase, parameters in self._planned(module):
            if phase.at == 0:
                freezing.thaw(parameters)

    def _note_first(self, module: pl.LightningModule) -> None:
        self._trained_at_once = {id(p) for p in module.parameters() if p.requires_grad}

    def _raise(self, module: pl.LightningModule) -> None:
        for phase, parameters in self._planned(module):
            # A packed weight is frozen before as well, but not because its model wants it so: that is refused.
            later = [p for p in parameters if is_packed(p) or id(p) not in self._frozen_before]
            freezing.thaw(later if phase.at > 0 else ())

    def _read(self, module: pl.LightningModule) -> None:
        named = [p for _, parameters in self._planned(module) for p in parameters]
        self._late = [p for p in named if p.requires_grad and id(p) not in self._trained_at_once]

    def _lower(self, module: pl.LightningModule) -> None:
        for parameter in self._late:
            parameter.requires_grad_(False)

    def _tell(self, module: pl.LightningModule) -> None:
        late = {id(p) for p in self._late}
        Attachment.of(module).train_later(name for name, p in module.named_parameters() if id(p) in late)
        self._forget()

    # -- while training -----------------------------------------------------------------------------------------------

    def begin(self, module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Finds the parameters of each phase; returns those that are thawed during the run, by name in the module."""
        self._forget()
        release(module)
        late = {name: p for name, p in module.named_parameters() if name in Attachment.of(module).late}
        ids = {id(p) for p in late.values()}
        self.parts = [(phase, {id(p): p for p in ps if id(p) in ids}) for phase, ps in self._planned(module)]
        self._plan = None
        mine = {key for _, parameters in self.parts for key in parameters}
        return {name: p for name, p in late.items() if id(p) in mine}

    def end(self) -> None:
        """Lets the model go."""
        self._forget()

    def open_phases(self, step: int, epoch: int) -> list[Phase]:
        """The phases that are reached."""
        return [phase for phase, _ in self.parts if phase.is_open(step, epoch)]

    def open_parameters(self, step: int, epoch: int) -> set[int]:
        """Identities of the parameters that train by now."""
        return {key for phase, parameters in self.parts if phase.is_open(step, epoch) for key in parameters}

    def set(self, module: nn.Module, trained: set[int]) -> bool:
        """Lets exactly ``trained`` of its parameters train; returns whether that changed anything."""
        release(module)
        changed = False
        for _, parameters in self.parts:
            for key, parameter in parameters.items():
                changed = changed or parameter.requires_grad != (key in trained)
                parameter.requires_grad_(key in trained)
        return changed


def release(module: nn.Module) -> None:
    """Under FSDP2 an evaluation may have left gathered copies in the parameters' places, with flags of their own."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def show_late_to_optimizers(module: pl.LightningModule) -> None:
    """While ``configure_optimizers`` runs, what is thawed later requires a gradient, as many a user's own asks for."""
    attachment = Attachment.of(module)
    original = module.configure_optimizers

    def configure_optimizers() -> Any:
        hidden = [p for name, p in module.named_parameters() if name in attachment.late and not p.requires_grad]
        try:
            freezing.thaw(hidden)
            return original()
        finally:
            for parameter in hidden:
                parameter.requires_grad_(False)

    attachment.on_leave(replace_on(module, "configure_optimizers", configure_optimizers))


def check_held(late: dict[str, nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Refuses optimizers that lack what will be thawed.

    Raises:
        Refusal: with the first name and the way out.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in late.items() if id(p) not in held]
    if missing:
        more = f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        raise Refusal(
            f"{missing[0]}{more} will be thawed, but no optimizer holds what thaws later; build it over self.parameters() in "
            "configure_optimizers, not over some of them."
        )
