"""The reference: the model with every trained part at a named snapshot, out of the same weights.

Fresh LoRA layers are exactly nothing, so at ``start`` they are switched off; every other trained tensor is kept as a
copy and swapped in for the forward passes inside ``with attachment.reference():``. Copies go into the checkpoint,
because a resumed run could only rebuild them from weights that it no longer has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.engine.checkpoints import ATTACHMENT
from lightning_ft.engine.gradients import like
from lightning_ft.engine.root import aside
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora_layers import LoRAEmbedding, LoRALayer
from lightning_ft.nn.registry import InjectedLayer, injected_layers


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
        self.copied: set[str] = set()
        """Names of snapshots in which no layer is switched off, because their tensors will be moved."""

    def take(self, name: str = "start") -> None:
        """Keeps the trained parts as they are now under ``name``, replacing an older snapshot of that name."""
        snapshot = Snapshot()
        owned: set[str] = set()
        for path, layer in injected_layers(self.module).items():
            names = {f"{path}.{n}" if path else n for n in layer.injected_parameters()}
            if name not in self.copied and is_identity(layer):
                snapshot.off.add(path)
                owned |= names
        beside = aside(self.module)  # no part of what is compared
        later: set[str] = getattr(self.module.__dict__.get(ATTACHMENT), "late", set())  # frozen now, trained in time
        for name_, parameter in self.module.named_parameters():
            if not (parameter.requires_grad or name_ in later) or name_ in owned or name_.startswith(beside):
                continue
            snapshot.tensors[name_] = parameter.detach().clone()  # each rank its own rows where FSDP2 has sharded
        self.snapshots[name] = snapshot

    @torch.no_grad()
    def move(self, name: str, share: float) -> None:
        """Brings a snapshot nearer to the present weights: each tensor becomes (1 - share) of its own and share of theirs."""
        parameters = dict(self.module.named_parameters())
        for name_, tensor in self.snapshots[name].tensors.items():
            tensor.mul_(1 - share).add_(parameters[name_].detach(), alpha=share)

    @contextmanager
    def active(self, name: str = "start") -> Iterator[None]:
        """Inside, the module computes as it did at the snapshot; ``base`` is the bare base, all injected layers off.

        Raises:
            Refusal: when no snapshot of that name was taken.
        """
        layers = injected_layers(self.module)
        if name == "base":
            kept = self.snapshots["base"].tensors if "base" in self.snapshots else {}
            snapshot = Snapshot(off=set(layers), tensors=kept)
            injected = {id(p) for layer in layers.values() for p in layer.injected_parameters().values()}
            beside = aside(self.module)
            for name_, parameter in self.module.named_parameters():
                if name_.startswith(beside):
                    continue
                if parameter.requires_grad and id(parameter) not in injected and name_ not in kept:
                    raise Refusal(
                        f"The bare base is gone: {name_} is trained in place and no copy of it was kept; ask for the "
                        "reference 'base' when the technique registers, or load the base again."
                    )
        elif name in self.snapshots:
            snapshot = self.snapshots[name]
        else:
            raise Refusal(f"There is no snapshot named {name!r}; there are {sorted(self.snapshots) or 'none'}.")
        before = {path: layers[path].enabled for path in snapshot.off}
        parameters = dict(self.module.named_parameters())
        undo: list[Callable[[], None]] = []
        try:
            for path in snapshot.off:
                layers[path].enabled = False
            for name_, tensor in snapshot.tensors.items():
                undo.append(swap(parameters[name_], tensor))
            with torch.no_grad():
                yield
        finally:
            for put_back in reversed(undo):
                put_back()
            for path, enabled in before.items():
                layers[path].enabled = enabled

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        return {name: snapshot.state() for name, snapshot in self.snapshots.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes the snapshots of a checkpoint instead of new ones, laid out as the parameters are."""
        parameters = dict(self.module.named_parameters())
        self.snapshots = {}
        for name, entry in state.items():
            tensors = {n: like(tensor, parameters[n]) for n, tensor in entry["tensors"].items()}
            self.snapshots[name] = Snapshot(off=set(entry["off"]), tensors=tensors)


def is_identity(layer: InjectedLayer) -> bool:
    """Whether the layer computes exactly what the wrapped module does at this moment; all ranks get one answer."""
    if not layer.starts_as_identity or not isinstance(layer, LoRALayer):
        return False
    zero = layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
    if layer.dora:
        return _all(zero == 0) and _all(torch.eq(cast(Tensor, layer.lora_magnitude), layer._norm()))
    return _all(zero == 0)


def _all(flags: Tensor) -> bool:
    return bool((flags.full_tensor() if isinstance(flags, DTensor) else flags).all())


def swap(parameter: nn.Parameter, tensor: Tensor) -> Callable[[], None]:
    """Lets the parameter hold ``tensor``'s values, and returns what puts its own back.

    FSDP2 gathers from the shard's own memory, so a sharded parameter is overwritten in place; a parameter that is
    gathered now (the root's, inside a step), or was never sharded, just points elsewhere for a while.
    """
    if isinstance(parameter, DTensor):
        local = parameter.to_local().data
        kept = local.clone()
        local.copy_(like(tensor, parameter).to_local())  # type: ignore[attr-defined]

        def put_back() -> None:
            local.copy_(kept)

        return put_back
    data = parameter.data
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    parameter.data = whole.to(device=parameter.device, dtype=parameter.dtype)
    return lambda: setattr(parameter, "data", data)
