"""An adapter as a folder, in the format that knows its kind: PEFT's, or for bottleneck adapters, which PEFT lacks, AdapterHub's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lightning_ft.formats.adapterhub import adapterhub_config, adapterhub_state, check_beside, write_adapterhub
from lightning_ft.formats.peft import check_others, peft_config, peft_state
from lightning_ft.formats.peft_folder import meant_adapter, write_peft
from lightning_ft.nn.bottleneck_layers import BottleneckLayer
from lightning_ft.nn.registry import injected_layers


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder will hold; under several ranks all make it and one writes it.

    Attributes:
        format: whose it is.
        config: content of ``adapter_config.json``.
        tensors: gathered, by their names in the file.
    """

    format: Literal["PEFT", "AdapterHub"]
    config: dict[str, object]
    tensors: dict[str, Tensor]

    def write(self, folder: str | Path) -> Path:
        """Write the folder; an earlier adapter in it is replaced, anything else is refused."""
        write = write_peft if self.format == "PEFT" else write_adapterhub
        return write(folder, self.config, self.tensors)


def format_of(model: nn.Module, adapter_name: str = "default") -> Literal["PEFT", "AdapterHub"]:
    """Return the format that an adapter of a model is written in; ``default`` also means the only adapter."""
    layers = injected_layers(model, meant_adapter(model, adapter_name)).values()
    return "AdapterHub" if any(isinstance(layer, BottleneckLayer) for layer in layers) else "PEFT"


def check_adapter(
    model: nn.Module, adapter_name: str = "default", *, without_head: bool = False, late: Collection[str] = ()
) -> None:
    """Refuse, without gathering anything, what `adapter_files` would refuse, and leaving out what else is trained.

    Args:
        model: The model that carries the adapter.
        adapter_name: Which one; ``default`` is also the only one that there is.
        without_head: Whether a trained head may be left out where the format has no place for it.
        late: Names of parameters that are frozen now and will be trained.

    Raises:
        Refusal: If there is no such adapter, the format cannot express it, or more is trained than it holds.
    """
    name = meant_adapter(model, adapter_name)
    if format_of(model, name) == "AdapterHub":
        check_beside(model, without_head=without_head, late=late)
        adapterhub_config(model, name)
    else:
        check_others(model, name, late=late)
        peft_config(model, adapter_name=name)


def adapter_files(
    model: nn.Module, adapter_name: str = "default", *, base_model_name: str | None = None
) -> AdapterFiles:
    """Return an adapter as its format has it; tensors that are sharded are gathered, so every rank calls this.

    Args:
        model: The model that carries the adapter; see `check_adapter` for what it must not carry beside it.
        adapter_name: Which one; ``default`` is also the only one that there is.
        base_model_name: Recorded so that PEFT's ``Auto`` classes find the base; None reads it from the model.

    Raises:
        Refusal: If there is no such adapter, or the format cannot express it.
    """
    name, kind = meant_adapter(model, adapter_name), format_of(model, adapter_name)
    if kind == "AdapterHub":
        return AdapterFiles(kind, adapterhub_config(model, name), adapterhub_state(model, name))
    config = peft_config(model, adapter_name=name, base_model_name=base_model_name)
    return AdapterFiles(kind, config, peft_state(model, name))


__all__ = ["AdapterFiles", "adapter_files", "check_adapter", "format_of"]
