"""Techniques with one fault each; the contract has to find it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits


class Clamps(LoRA):
    """Stores another rank than it was given."""

    def __init__(self, r: int = 8, name: str = "default") -> None:
        super().__init__(max(r, 4), name=name)


class Remembers(LoRA):
    """Writes a public attribute while it trains."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.steps = 3


class LeavesHook(LoRA):
    """Never takes its hook off."""

    def register(self, attachment: Any) -> None:
        super().register(attachment)
        attachment.module.net[1].register_forward_hook(lambda *args: None)


class LeavesWrapper(LoRA):
    """Never takes its wrapper off."""

    def register(self, attachment: Any) -> None:
        super().register(attachment)
        attachment.module.on_train_epoch_end = lambda: None


class LeavesMode(LoRA):
    """Leaves a layer in evaluation."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        pl_module.net[1].train(not pl_module.net[1].training)


class LeavesTrainer(LoRA):
    """Turns a field of the Trainer."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trainer.gradient_clip_val = 0.5


class LeavesSeed(LoRA):
    """Draws from the global generator after the run."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        torch.rand(1)


class Meddles(LoRA):
    """Changes a frozen weight."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        with torch.no_grad():
            pl_module.net[0].base.weight.mul_(1.001)


class StartsElsewhere(LoRA):
    """Says that it starts as identity, and does not."""

    def register(self, attachment: Any) -> None:
        super().register(attachment)
        attachment.edit("hooks", "scale", self._scale)

    def _scale(self, module: Any) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)


class OrderMatters(LoRA):
    """Edits in setup, where the place in the callback list decides."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.name == "second" and not Attachment.of(pl_module)._installed:
            with torch.no_grad():
                pl_module.net[0].weight.mul_(2.0)
        super().setup(trainer, pl_module, stage)


class Reduced(LoRA):
    """Keeps its factors in bf16."""

    def register(self, attachment: Any) -> None:
        super().register(attachment)
        attachment.edit("hooks", "reduce", self._reduce)

    def _reduce(self, module: Any) -> None:
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()


class Forgets(LoRA):
    """Saves a state and does not load it."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": getattr(self, "_seen", 0)}

    def on_train_batch_end(self, *args: Any) -> None:
        self._seen = getattr(self, "_seen", 0) + 1


class Undescribed(Technique):
    """Trains the last bias.

    Args:
        name: of it.
    """

    traits = Traits(slot="undescribed", edits=frozenset({"model"}))

    def __init__(self, strength: float = 1.0, name: str = "x") -> None:
        self.strength, self.name = strength, name


class Unchecked(LoRA):
    """Takes any rank."""

    def check(self) -> None:
        pass

    def config(self) -> Any:
        return None


class Stubborn(LoRA):
    """Trains a parameter that nothing uses."""

    def register(self, attachment: Any) -> None:
        super().register(attachment)
        attachment.conditional({"net.unused"})
        attachment.edit("hooks", "unused", self._unused)

    def _unused(self, module: Any) -> None:
        model_root(module)[1].net.register_parameter("unused", nn.Parameter(torch.zeros(2)))
