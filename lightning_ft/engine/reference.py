"""The reference: the model with every trained part at a named snapshot, out of the same weights.

Fresh LoRA layers are exactly nothing, so at ``start`` they are switched off; every other trained tensor is kept as a
copy and swapped in for the forward passes inside ``with attachment.reference():``. Copies go into the checkpoint,
because a resumed run could only rebuild them from weights that it no longer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers


@dataclass
class Snapshot:
    """Trained parts at one moment: layers that were exactly nothing, and copies of every other trained tensor."""

    off: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain types only, as a checkpoint holds them."""
        return {"off": sorted(self.off), "tensors": dict(self.tensors)}


class References:
    """Named snapshots of a module's trained parts."""

    def __init__(self, module: nn.Module) -> None:
        """Args: module: the LightningModule whose trained parts are kept."""
        self.module = module
        self.snapshots: dict[str, Snapshot] = {}

    def take(self, name: str = "start") -> None:
        """Keeps the trained parts as they are now under ``name``, replacing an older snapshot of that name."""
        snapshot = Snapshot()
        owned: set[str] = set()
        for path, layer in injected_layers(self.module).items():
            names = {f"{path}.{n}" if path else n for n in layer.injected_parameters()}
            if layer.is_identity():
                snapshot.off.add(path)
                owned |= names
        for name_, parameter in self.module.named_parameters():
            if not parameter.requires_grad or name_ in owned:
                continue
            if isinstance(parameter, DTensor):
                raise Refusal(
                    f"A reference needs a copy of {name_}, which FSDP2 has sharded; train a fresh LoRA (whose reference needs "
                    "no copy), or use ddp."
                )
            snapshot.tensors[name_] = parameter.detach().clone()
        self.snapshots[name] = snapshot

    @contextmanager
    def active(self, name: str = "start") -> Iterator[None]:
        """Inside, the module computes as it did at the snapshot; ``base`` is the bare base, all injected layers off.

        Raises:
            Refusal: when no snapshot of that name was taken.
        """
        layers = injected_layers(self.module)
        if name == "base":
            snapshot = Snapshot(off=set(layers), tensors=self.snapshots.get("base", Snapshot()).tensors)
        elif name in self.snapshots:
            snapshot = self.snapshots[name]
        else:
            raise Refusal(f"There is no snapshot named {name!r}; there are {sorted(self.snapshots) or 'none'}.")
        before = {path: layers[path].enabled for path in snapshot.off}
        parameters = dict(self.module.named_parameters())
        swapped: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for path in snapshot.off:
                layers[path].enabled = False
            for name_, tensor in snapshot.tensors.items():
                parameter = parameters[name_]
                swapped.append((parameter, parameter.data))
                parameter.data = tensor.to(device=parameter.device, dtype=parameter.dtype)
            with torch.no_grad():
                yield
        finally:
            for parameter, data in swapped:
                parameter.data = data
            for path, enabled in before.items():
                layers[path].enabled = enabled

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        return {name: snapshot.state() for name, snapshot in self.snapshots.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes the snapshots of a checkpoint instead of new ones."""
        self.snapshots = {
            name: Snapshot(off=set(entry["off"]), tensors=dict(entry["tensors"])) for name, entry in state.items()
        }
