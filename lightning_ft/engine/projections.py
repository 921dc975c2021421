"""Matrices that bring a student's hidden states to its teacher's width: parameters of the module, trained and saved with it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.seeding import seeded_generator


def key(layer: int) -> str:
    """The name of the matrix of a layer."""
    return f"layer_{layer}"


def add_projections(
    module: Any, attachment: Attachment, place: str, layers: Collection[int], own: int, width: int, rate: float
) -> None:
    """Gives a module a matrix for each layer, drawn by (seed, name) alone; none where the widths are equal.

    Args:
        module: to which they belong.
        attachment: the module's.
        place: the name of what holds them.
        layers: numbers of the student's.
        own: width of the student's hidden states.
        width: of the teacher's.
        rate: factor of the learning rate.
    """
    if width == own:
        return
    matrices = nn.ModuleDict()
    for number in layers:
        path = f"{place}.{key(number)}"
        matrix = nn.Linear(own, width, bias=False, device="cpu", dtype=torch.float32)
        drawn = torch.randn(
            width, own, generator=seeded_generator(attachment.seed, path), device="cpu", dtype=torch.float32
        )
        matrix.weight = nn.Parameter(drawn * own**-0.5)
        matrices[key(number)] = matrix
    module.add_module(place, matrices)
    names = [f"{place}.{name}.weight" for name in matrices]
    attachment.rate(dict.fromkeys(names, float(rate)))
    attachment.group(place, names)


def check_projections(module: Any, place: str, layers: Collection[int], own: int, width: int) -> None:
    """Refuses matrices that were made for another teacher.

    Args:
        module: to which they belong, if there are any.
        place: the name of what holds them.
        layers: numbers of the student's that are compared.
        own: width of the student's hidden states.
        width: of the teacher's.

    Raises:
        Refusal: their width is another, or a layer has none.
    """
    matrices = getattr(module, place, None)
    given = {matrix.out_features for matrix in matrices.values()} if matrices is not None else set()
    named = set(matrices) if matrices is not None else set()
    fits = given == {width} if given else width == own
    if not fits or (given and {key(number) for number in layers} - named):
        raise Refusal(
            f"The module's projections do not fit a teacher whose hidden states have {width} numbers; leave teacher_width out, or "
            "begin with a new module."
        )


__all__ = ["add_projections", "check_projections", "key"]
