"""Edits of a model, in fixed phases, each once: so that the order in which techniques come is of no effect."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_ft.engine.checkpoints import fingerprint
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers

PHASES = ("quantise", "freeze", "inject", "dtype", "hooks", "checkpointing", "shard", "compile")
"""Model edits run in this order, after the module's own ``configure_model`` has loaded the base."""

Edit = Callable[[pl.LightningModule], None]


class Edits:
    """What techniques do to the model of one LightningModule.

    Attributes:
        registered: (place of the phase, order in it, name, edit) of this run; those done in an earlier run come again.
        fingerprint: of the frozen parameters before they are sharded; None until the edits have run.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        """Args: module: whose model is edited."""
        self.module = module
        self.registered: list[tuple[int, int, str, Edit]] = []
        self.fingerprint: str | None = None
        self._done: set[tuple[int, str]] = set()
        self._injected: set[str] = set()

    def add(self, phase: str, name: str, edit: Edit, *, order: int = 0, again: bool = False) -> None:
        """Registers an edit; one that was done in an earlier run is not repeated, unless ``again``."""
        self.registered.append((PHASES.index(phase), order, name, edit))
        if again:
            self._done.discard((PHASES.index(phase), name))

    def apply(self) -> None:
        """Runs the edits that were not yet done, in phase order."""
        lost = self._injected - set(injected_layers(self.module))
        if lost:
            raise Refusal(
                f"configure_model has rebuilt the net and lost injected layers such as {sorted(lost)[0]}; build it once "
                "(`if self.net is None: ...`)."
            )
        for part in self.module.modules():
            # bitsandbytes' own 4-bit layers, from transformers say, repack themselves at the first evaluation on some CPUs,
            # and every later gradient is wrong.
            if getattr(part, "support_avx512bf16_for_cpu", False):
                part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        sharded = any(isinstance(p, DTensor) for p in self.module.parameters())
        for phase, _, name, edit in sorted(self.registered, key=lambda e: e[:3]):
            if (phase, name) in self._done:
                continue
            if sharded and phase >= PHASES.index("shard"):
                if isinstance(self.module, FSDPModule):
                    edit(self.module)
                continue  # else the user's configure_model has sharded by itself
            if sharded and phase != PHASES.index("hooks"):
                raise Refusal(
                    f"{name} cannot edit a model that configure_model has already sharded; call the plain function "
                    "(inject_lora(...)) in configure_model before fully_shard, or leave the sharding to this library."
                )
            if phase >= PHASES.index("shard") and self.fingerprint is None:
                self.fingerprint = fingerprint(self.module)
            edit(self.module)
            self._done.add((phase, name))
        if self.fingerprint is None:
            self.fingerprint = fingerprint(self.module)
        self._injected = set(injected_layers(self.module))
