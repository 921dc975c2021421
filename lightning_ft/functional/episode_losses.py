"""Losses by name, for the inner and the outer loop.

cross_entropy: - log softmax(z)_y in nats; mse: the mean of (z - y)^2 over a row's outputs; mae: of |z - y|; huber: of
(z - y)^2 / 2 where |z - y| < 1, else |z - y| - 1/2. All in fp32 at least. Of two answers' rewards, the better one's first and
y = 0, cross_entropy is the Bradley-Terry loss. Losses of a policy's pairs are those of `lightning_ft.functional.preference`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

from lightning_ft.functional import preference
from lightning_ft.functional.errors import Refusal

LossName = Literal[
    "auto",
    "cross_entropy",
    "mse",
    "mae",
    "huber",
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "discopop",
    "simpo",
]


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    # Under torch.func the backward of F.mse_loss is decomposed in Python, in every step anew.
    return (outputs - targets).square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": partial(F.cross_entropy, reduction="none"),
    "mse": _squares,
    "mae": partial(F.l1_loss, reduction="none"),
    "huber": partial(F.huber_loss, reduction="none"),
}
"""Name -> (outputs, targets) -> the loss of each value: of classes one a row."""


def mean_loss(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows of the loss of each: that of all values at once, since each row has as many.

    Args:
        name: one of `LOSSES`, or ``auto``: cross_entropy where the targets are whole numbers, else mse.
        outputs: (S, C) logits, or (S, ...) values.
        targets: (S,) int64 classes, or float values of the outputs' shape ((S,) meets (S, 1)).

    Returns:
        A scalar.

    Raises:
        Refusal: targets that the loss cannot compare with.
    """
    if name == "auto":
        name = "mse" if targets.is_floating_point() else "cross_entropy"
    if targets.is_floating_point() == (name == "cross_entropy"):
        wanted = "classes" if name == "cross_entropy" else "values with a fraction"
        raise Refusal(
            f"The loss {name} compares with {wanted}, and the targets are {targets.dtype}; take another loss."
        )
    if outputs.dtype not in (torch.float32, torch.float64):
        outputs = outputs.float()
    if name != "cross_entropy" and outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs[..., 0]
    if name != "cross_entropy" and outputs.shape != targets.shape:
        raise Refusal(
            f"The net gives outputs of shape {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}; give it as "
            "many outputs as a row has values."
        )
    if name != "cross_entropy" and targets.dtype != outputs.dtype:
        targets = targets.to(outputs.dtype)
    return LOSSES[name](outputs, targets).mean()


def pairs_of(logps: Tensor, known: Tensor) -> preference.Pairs:
    """What a policy says of pairs.

    Args:
        logps: (P, 2) summed log-probabilities of the better and of the worse answer.
        known: (P, 2) how many tokens they have; (P, 4) then also their log-probabilities by the reference.
    """
    known = known.to(logps.dtype)
    before = (known[:, 2], known[:, 3]) if known.shape[1] > 2 else (None, None)
    return preference.Pairs(logps[:, 0], logps[:, 1], known[:, 0], known[:, 1], *before)


def mean_preference(name: str, logps: Tensor, known: Tensor, beta: float) -> Tensor:
    """The mean over pairs of a preference loss; ``auto`` is ``sigmoid``, which is DPO.

    Args:
        name: a loss of `lightning_ft.functional.preference` that judges each pair by itself.
        logps: (P, 2), see `pairs_of`.
        known: (P, 4), of losses without a reference (P, 2).
        beta: how strongly the policy is held to the reference.
    """
    return _preference(name).of(pairs_of(logps, known), preference.Settings(beta=beta)).mean()


def preferred(name: str, logps: Tensor, known: Tensor) -> Tensor:
    """(P,) 1 where the better answer has the greater reward: against the reference, the mean of a token, or the sum."""
    loss, pairs = _preference(name), pairs_of(logps, known)
    if loss.reference:
        better, worse = pairs.chosen_ratio, pairs.rejected_ratio
    else:
        better, worse = (pairs.chosen_mean, pairs.rejected_mean) if loss.means else (pairs.chosen, pairs.rejected)
    return (better > worse).float()


def refers(name: str) -> bool:
    """Whether a preference loss compares with a reference."""
    return _preference(name).reference


def _preference(name: str) -> preference.Loss:
    return preference.LOSSES["sigmoid" if name == "auto" else name]


__all__ = ["LOSSES", "LossName", "mean_loss", "mean_preference", "pairs_of", "preferred", "refers"]
