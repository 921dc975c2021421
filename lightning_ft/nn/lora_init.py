"""Where LoRA's factors start: at nothing (LoRA itself), or at a part of the weight that they change (PiSSA, OLoRA).

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, eq. 2 to 4) starts at the principal singular triplets,
``A = S^(1/2) V^T``, ``B = U S^(1/2)``, and OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775) at the first columns
of ``W = Q R``. Both take what the factors start with out of the base weight. Here frozen weights keep their bytes, and the
start is subtracted instead: ``W + s (B A - B0 A0)`` with frozen copies of ``A0`` and ``B0``, which is the same function.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.select import is_linear

Init = Literal["default", "gaussian", "pissa", "olora"]
FROM_WEIGHT = ("pissa", "olora")


def check_start(module: nn.Module, name: str, shape: tuple[int, ...], r: int, init: str) -> None:
    """Refuse a start at a part of the weight where it cannot be had.

    Args:
        module: The pristine module to wrap.
        name: Its pristine name.
        shape: (out, in) of its weight.
        r: Rank.
        init: ``pissa`` or ``olora``.
    """
    if not is_linear(module):
        raise Refusal(
            f"LoRA cannot start {name!r} with init {init!r}, which takes a linear layer's matrix apart: it is a "
            f"{type(module).__name__}; exclude it, or leave init at 'default'."
        )
    if cast(Tensor, module.weight).is_meta:
        raise Refusal(
            f"LoRA cannot start {name!r} with init {init!r}: the base's values are not loaded yet (meta device); load them "
            "first, or leave init at 'default'."
        )
    if r > min(shape):
        raise Refusal(
            f"r = {r} on {name!r} is more than init {init!r} can take from a matrix of {shape[0]} x {shape[1]}; use a smaller "
            "r, or a rank_pattern for this layer."
        )


@torch.no_grad()
def factors_of_weight(weight: Tensor, r: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """Return the first values of ``A`` (r, in) and ``B`` (out, r), fp32, the same at each call.

    Args:
        weight: (out, in), of any floating-point dtype; computed with in fp32.
        r: Rank, at most the smaller side of the weight.
        scale: What multiplies ``B A``; PiSSA's product times it is the weight's best approximation of this rank.
        init: ``pissa`` or ``olora``.
    """
    weight = weight.float()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, vh, root = u[:, :r], vh[:r], (s[:r] / scale).sqrt()
        # A pair of singular vectors is given up to its sign: let the largest entry of each left one be positive.
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign().squeeze(0)
        return (root * sign)[:, None] * vh, u * (root * sign)
    q, upper = torch.linalg.qr(weight)
    diagonal = upper.diagonal()[:r]
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal)
    return sign[:, None] * upper[:r], q[:, :r] * sign


def difference(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return factors of twice the rank whose product is ``B A - B0 A0``; without a start, ``A`` and ``B`` themselves.

    It is ``(B - B0) A + B0 (A - A0)``: exactly nothing at the start, and no small difference of two large products after
    it, which bf16 would round away.
    """
    if a0 is None or b0 is None:
        return a, b
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], 1)


__all__ = ["FROM_WEIGHT", "Init", "check_start", "difference", "factors_of_weight"]
