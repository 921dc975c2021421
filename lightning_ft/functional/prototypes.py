"""Classes as the means of their few examples (Snell et al., 2017, equations 1 and 2).

    c_k = mean of z_i over the support rows i of class k,    p(y = k | x) = softmax_k(- d(z, c_k))

with d the squared Euclidean distance, or d = - s cos(z, c_k) with the scale s (Vinyals et al., 2016).

Under autocast too they are computed in the precision of the embeddings: products of bfloat16 would round the classes' means.

Axes: S support rows, Q query rows, C classes, D width of an embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

Distance = Literal["euclidean", "cosine"]


def prototypes(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean embedding of each class.

    Args:
        embeddings: (S, D).
        labels: (S,) int64 from 0 to ``classes`` - 1, each at least once.
        classes: C.

    Returns:
        (C, D); of a class without rows zeros.
    """
    chosen = F.one_hot(labels, classes).to(embeddings.dtype)  # (S, C)
    with torch.autocast(embeddings.device.type, enabled=False):
        return (chosen.t() @ embeddings) / chosen.sum(0).clamp(min=1)[:, None]


def prototype_logits(query: Tensor, centres: Tensor, *, distance: Distance = "euclidean", scale: float = 1.0) -> Tensor:
    """Logits of query rows.

    Args:
        query: (Q, D).
        centres: (C, D).
        distance: ``euclidean`` (squared), or ``cosine``.
        scale: what the logits are multiplied by.

    Returns:
        (Q, C).
    """
    if distance == "cosine":
        with torch.autocast(query.device.type, enabled=False):
            return scale * F.normalize(query, dim=-1) @ F.normalize(centres, dim=-1).t()
    return -scale * (query[:, None] - centres[None]).square().sum(-1)


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, *, penalty: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The linear classifier on given features that minimises the penalised cross-entropy, by L-BFGS in float64.

        sum_i - log softmax(W z_i + b)_{y_i} + penalty / 2 ||W||^2

    Args:
        features: (S, D).
        labels: (S,) int64.
        classes: C.
        penalty: of the weight's squares, not of the bias; 1 is scikit-learn's default, there the inverse of ``C``.

    Returns:
        (C, D) weight and (C,) bias, float64.
    """
    x = features.detach().double()
    with torch.enable_grad():
        weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(x @ weight.t() + bias, labels, reduction="sum")
            loss = loss + penalty / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


__all__ = ["Distance", "logistic_regression", "prototype_logits", "prototypes"]
