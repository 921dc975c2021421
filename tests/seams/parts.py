"""Small techniques that touch every seam, for tests of the attachment itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Traits


class Decay(Technique):
    """A closed-form gradient edit that counts its calls and notes the gradients' norms that it met."""

    traits: ClassVar[Traits] = Traits(slot="decay", edits=frozenset({"gradients"}))

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate
        self.calls = 0
        self.norms: list[float] = []

    def register(self, attachment: Attachment) -> None:
        attachment.gradient_edit(self)

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        self.calls += 1
        self.norms.append(float(sum(p.grad.square().sum() for p in parameters.values()) ** 0.5))
        for parameter in parameters.values():
            parameter.grad.add_(self.rate * parameter.detach())


class Small(Technique):
    """A loss term: the mean over rows of the squared norm of the layers' biases, so that it needs no batch of ours."""

    traits: ClassVar[Traits] = Traits(slot="small", edits=frozenset({"loss"}))

    def __init__(self, weight: float = 0.5, name: str = "small") -> None:
        self.weight = weight
        self.name = name

    def register(self, attachment: Attachment) -> None:
        attachment.loss_term(self.name, self.term)

    def term(self, module, batch, output) -> Term:
        value = sum(p.square().sum() for p in module.parameters() if p.requires_grad)
        return Term(self.name, 3.0 * value, 3.0, "row", self.weight)


class Noise(Technique):
    """A model edit in a late phase: noise on what the norm gives, drawn from the global generator while training."""

    traits: ClassVar[Traits] = Traits(slot="noise", edits=frozenset({"model"}))

    def register(self, attachment: Attachment) -> None:
        attachment.edit("hooks", "noise", lambda module: module.net.norm.register_forward_hook(self.hook))

    def hook(self, module, args, output):
        return output + 0.01 * torch.randn_like(output) if module.training else output
