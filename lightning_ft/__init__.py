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
    from lightning_ft.adapt import adapt
    from lightning_ft.callbacks.agem import AGEM
    from lightning_ft.callbacks.bottleneck_adapter import BottleneckAdapter
    from lightning_ft.callbacks.distillation import Distillation
    from lightning_ft.callbacks.ema import WeightEMA
    from lightning_ft.callbacks.ewc import EWC
    from lightning_ft.callbacks.export_adapter import ExportAdapter
    from lightning_ft.callbacks.freeze import Freeze
    from lightning_ft.callbacks.generation_metrics import GenerationMetrics
    from lightning_ft.callbacks.gradient_surgery import GradientSurgery
    from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
    from lightning_ft.callbacks.ia3 import IA3
    from lightning_ft.callbacks.lora import LoRA
    from lightning_ft.callbacks.loss_balancing import LossBalancing
    from lightning_ft.callbacks.lwf import LwF
    from lightning_ft.callbacks.mas import MAS
    from lightning_ft.callbacks.neftune import NEFTune
    from lightning_ft.callbacks.orthogonal_lora import OrthogonalLoRA
    from lightning_ft.callbacks.prefix_tuning import PrefixTuning
    from lightning_ft.callbacks.prompt_tuning import PromptTuning
    from lightning_ft.callbacks.replay import Replay
    from lightning_ft.callbacks.samples import SampleGenerations
    from lightning_ft.callbacks.si import SynapticIntelligence
    from lightning_ft.callbacks.task_sampling import TaskSampling
    from lightning_ft.data.classification_data import ClassificationData
    from lightning_ft.data.episode_data import EpisodeData
    from lightning_ft.data.multitask_data import MultiTaskData
    from lightning_ft.data.preference_data import PreferenceData
    from lightning_ft.data.prompt_data import PromptData
    from lightning_ft.data.seq2seq_data import Seq2SeqData
    from lightning_ft.data.sft_data import SFTData
    from lightning_ft.data.task_stream import TaskStream
    from lightning_ft.data.unpaired_data import UnpairedPreferenceData
    from lightning_ft.engine.attachment import Attachment
    from lightning_ft.engine.in_backward import InBackward
    from lightning_ft.engine.rewards.reward import Reward
    from lightning_ft.engine.strategies import FSDP2Strategy
    from lightning_ft.functional.errors import Refusal
    from lightning_ft.load import load
    from lightning_ft.modules.dpo import DPO
    from lightning_ft.modules.grpo import GRPO
    from lightning_ft.modules.kto import KTO
    from lightning_ft.modules.linear_probe import LinearProbe
    from lightning_ft.modules.maml import MAML
    from lightning_ft.modules.multitask import MultiTask
    from lightning_ft.modules.on_policy_distillation import OnPolicyDistillation
    from lightning_ft.modules.online_dpo import OnlineDPO
    from lightning_ft.modules.ppo import PPO
    from lightning_ft.modules.protonet import ProtoNet
    from lightning_ft.modules.reptile import Reptile
    from lightning_ft.modules.reward_model import RewardModel
    from lightning_ft.modules.sft import SFT
    from lightning_ft.nn.adapters import set_adapters
    from lightning_ft.nn.ia3 import inject_ia3
    from lightning_ft.nn.lora import inject_lora
    from lightning_ft.nn.prefix import inject_prefix
    from lightning_ft.nn.prompt import inject_prompt

__version__ = "0.1.0"

_HOMES = {
    "AGEM": "callbacks.agem",
    "Attachment": "engine.attachment",
    "BottleneckAdapter": "callbacks.bottleneck_adapter",
    "ClassificationData": "data.classification_data",
    "DPO": "modules.dpo",
    "Distillation": "callbacks.distillation",
    "EWC": "callbacks.ewc",
    "EpisodeData": "data.episode_data",
    "ExportAdapter": "callbacks.export_adapter",
    "FSDP2Strategy": "engine.strategies",
    "Freeze": "callbacks.freeze",
    "GRPO": "modules.grpo",
    "GenerationMetrics": "callbacks.generation_metrics",
    "GradientSurgery": "callbacks.gradient_surgery",
    "GradualUnfreezing": "callbacks.gradual_unfreezing",
    "IA3": "callbacks.ia3",
    "InBackward": "engine.in_backward",
    "KTO": "modules.kto",
    "LinearProbe": "modules.linear_probe",
    "LoRA": "callbacks.lora",
    "LossBalancing": "callbacks.loss_balancing",
    "LwF": "callbacks.lwf",
    "MAML": "modules.maml",
    "MAS": "callbacks.mas",
    "MultiTask": "modules.multitask",
    "MultiTaskData": "data.multitask_data",
    "NEFTune": "callbacks.neftune",
    "OnPolicyDistillation": "modules.on_policy_distillation",
    "OnlineDPO": "modules.online_dpo",
    "OrthogonalLoRA": "callbacks.orthogonal_lora",
    "PPO": "modules.ppo",
    "PreferenceData": "data.preference_data",
    "PrefixTuning": "callbacks.prefix_tuning",
    "PromptData": "data.prompt_data",
    "PromptTuning": "callbacks.prompt_tuning",
    "ProtoNet": "modules.protonet",
    "Refusal": "functional.errors",
    "Replay": "callbacks.replay",
    "Reptile": "modules.reptile",
    "Reward": "engine.rewards.reward",
    "RewardModel": "modules.reward_model",
    "SFT": "modules.sft",
    "SFTData": "data.sft_data",
    "SampleGenerations": "callbacks.samples",
    "Seq2SeqData": "data.seq2seq_data",
    "SynapticIntelligence": "callbacks.si",
    "TaskSampling": "callbacks.task_sampling",
    "TaskStream": "data.task_stream",
    "UnpairedPreferenceData": "data.unpaired_data",
    "WeightEMA": "callbacks.ema",
    "adapt": "adapt",
    "inject_ia3": "nn.ia3",
    "inject_lora": "nn.lora",
    "inject_prefix": "nn.prefix",
    "inject_prompt": "nn.prompt",
    "load": "load",
    "set_adapters": "nn.adapters",
}

__all__ = [
    "AGEM",
    "Attachment",
    "BottleneckAdapter",
    "ClassificationData",
    "DPO",
    "Distillation",
    "EWC",
    "EpisodeData",
    "ExportAdapter",
    "FSDP2Strategy",
    "Freeze",
    "GRPO",
    "GenerationMetrics",
    "GradientSurgery",
    "GradualUnfreezing",
    "IA3",
    "InBackward",
    "KTO",
    "LinearProbe",
    "LoRA",
    "LossBalancing",
    "LwF",
    "MAML",
    "MAS",
    "MultiTask",
    "MultiTaskData",
    "NEFTune",
    "OnPolicyDistillation",
    "OnlineDPO",
    "OrthogonalLoRA",
    "PPO",
    "PreferenceData",
    "PrefixTuning",
    "PromptData",
    "PromptTuning",
    "ProtoNet",
    "Refusal",
    "Replay",
    "Reptile",
    "Reward",
    "RewardModel",
    "SFT",
    "SFTData",
    "SampleGenerations",
    "Seq2SeqData",
    "SynapticIntelligence",
    "TaskSampling",
    "TaskStream",
    "UnpairedPreferenceData",
    "WeightEMA",
    "__version__",
    "adapt",
    "inject_ia3",
    "inject_lora",
    "inject_prefix",
    "inject_prompt",
    "load",
    "set_adapters",
]


def names_below(*floors: str) -> list[str]:
    """Public names whose home lies in one of these folders, as in ``names_below("modules", "data")``; loads nothing."""
    return [name for name, home in _HOMES.items() if home.split(".")[0] in floors]


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
