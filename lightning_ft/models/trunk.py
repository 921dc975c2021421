"""A model without its head: what several tasks share."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_ft.models.backbone import BackboneView, find_backbone


class Trunk(BackboneView):
    """A view of a transformers model whose head was taken off; may be made anew at any time."""

    def __init__(self, model: Any) -> None:
        """Args: model: a transformers model."""
        self.model = model
        self.backbone = find_backbone(model)


def take_off_head(model: Any) -> None:
    """Puts nothing in the place of each part outside the backbone, so that names in the backbone stay as they are."""
    backbone = find_backbone(model)
    for name, child in list(model.named_children()):
        if child is not backbone:
            setattr(model, name, nn.Identity())


__all__ = ["Trunk", "take_off_head"]
