"""Fine-tuning techniques for PyTorch Lightning that compose.

A technique is a LightningModule (what is optimised) or a Callback (what is trained, what is added to the loss, what is
kept from before); every name of the public surface is importable from here and loads its file when first used, so that
``import lightning_ft`` alone loads nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ft.callbacks.ema import WeightEMA
    from lightning_ft.callbacks.export_adapter import ExportAdapter
    from lightning_ft.callbacks.freeze import Freeze
    from lightning_ft.callbacks.generation_metrics import GenerationMetrics
    from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
    from lightning_ft.callbacks.lora import LoRA
    from lightning_ft.callbacks.neftune import NEFTune
    from lightning_ft.callbacks.samples import SampleGenerations
    from lightning_ft.data.classification_data import ClassificationData
    from lightning_ft.data.seq2seq_data import Seq2SeqData
    from lightning_ft.data.sft_data import SFTData
    from lightning_ft.engine.attachment import Attachment
    from lightning_ft.engine.in_backward import InBackward
    from lightning_ft.functional.errors import Refusal
    from lightning_ft.load import load
    from lightning_ft.modules.sft import SFT
    from lightning_ft.nn.lora import inject_lora

__version__ = "0.1.0"

_HOMES = {
    "Attachment": "engine.attachment",
    "ClassificationData": "data.classification_data",
    "ExportAdapter": "callbacks.export_adapter",
    "Freeze": "callbacks.freeze",
    "GenerationMetrics": "callbacks.generation_metrics",
    "GradualUnfreezing": "callbacks.gradual_unfreezing",
    "InBackward": "engine.in_backward",
    "LoRA": "callbacks.lora",
    "NEFTune": "callbacks.neftune",
    "Refusal": "functional.errors",
    "SFT": "modules.sft",
    "SFTData": "data.sft_data",
    "SampleGenerations": "callbacks.samples",
    "Seq2SeqData": "data.seq2seq_data",
    "WeightEMA": "callbacks.ema",
    "inject_lora": "nn.lora",
    "load": "load",
}

__all__ = [
    "SFT",
    "Attachment",
    "ClassificationData",
    "ExportAdapter",
    "Freeze",
    "GenerationMetrics",
    "GradualUnfreezing",
    "InBackward",
    "LoRA",
    "NEFTune",
    "Refusal",
    "SFTData",
    "SampleGenerations",
    "Seq2SeqData",
    "WeightEMA",
    "__version__",
    "inject_lora",
    "load",
]


class _Package(ModuleType):
    """Keeps a public name that is also a file's (``load``) from becoming the file when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
