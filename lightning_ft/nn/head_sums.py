"""Losses that are sums over tokens, any number of them in one pass over the output head, their gradient taken on the way.

`lightning_ft.nn.head` gives a number for each token, whose gradient nobody knows before backward: a head that is trained runs
again there, four matrix products a chunk for each score. Of sums, one loss or several whose weights are known beforehand, all of
d loss / d logits is known while a chunk's logits are at hand. It is pulled back at once to the hidden states and to what is
trained in the head, where it is added up over the chunks, and backward only scales it: three products a chunk for all losses
together, two where the head is frozen, and the logits of a second model are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.functional import token_scores
from lightning_ft.functional.token_scores import Distribution, TopK
from lightning_ft.nn.head import (
    Asked,
    Other,
    check,
    check_labels,
    check_logits,
    chunk_on,
    other_leaves,
    row_blocks,
    score_tokens,
    second_of,
)


@dataclass(eq=False)
class Summed:
    """One loss: ``factor`` times the sum over all tokens of one score.

    Attributes:
        output: which, see `lightning_ft.nn.head.score_tokens`.
        factor: what it is multiplied by; -1 makes a loss of a log-probability.
        weight: of this loss in the total that will be differentiated, at least 0; only how the weights of losses of one pass relate
            is looked at, and of a single loss nothing.
        temperature: what logits are divided by.
        beta: of divergences that have one.
        other: the second model of a divergence.
        size: how many tokens of a padded vocabulary are compared; None: all.
        chunk_size: tokens whose logits exist at one time; None: as many as suit the device.
        sum: scalar, the loss, once the pass was made.
    """

    output: str = "logprob"
    factor: float = -1.0
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    other: Other | None = None
    size: int | None = None
    chunk_size: int | None = None
    sum: Tensor | None = field(default=None, init=False)

    @property
    def asked(self) -> Asked:
        """For the arithmetic of a block of rows."""
        return Asked((self.output,), self.temperature, 0, self.beta)


def sum_scores(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    losses: Sequence[Summed],
    *,
    added: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Computes losses of the same tokens in one pass over the head, and leaves each in its ``sum``.

    Args:
        hidden: (N, D) hidden states of the scored positions only, N at least 1.
        labels: (N,) int64, the tokens of "logprob", in [0, V).
        head: maps (n, D) to logits (n, V); called once for each chunk, in order. Whatever is trained in it gets its gradient.
        losses: what is asked for; those without a weight are computed and not differentiated.
        added: trained tensor -> where the head adds up its gradient by itself, see `AddingLinear`.

    Raises:
        Refusal: as `score_tokens`.
        RuntimeError: in backward, on a CPU: the losses are weighed otherwise than was said.
    """
    chunk_size = min(one.chunk_size or chunk_on(hidden.device) for one in losses)
    for one in losses:
        check(hidden, labels, one.asked, chunk_size, one.other)
    graded = torch.is_grad_enabled() and any(one.weight > 0 for one in losses)
    watch = graded and hidden.requires_grad
    kept: dict[Tensor, Tensor] = {**({hidden: torch.empty_like(hidden)} if watch else {}), **(added or {})}
    leaves: list[Tensor] = []
    values: list[list[Tensor]] = [[] for _ in losses]
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, min(start + chunk_size, len(hidden)))
        chunk = hidden[rows].detach().requires_grad_(graded and (watch or bool(added)))
        with torch.no_grad():  # before the head's graph: a teacher may be the same weights at another time
            seconds = [one.other(rows) if one.other is not None else None for one in losses]
        with torch.set_grad_enabled(graded):
            logits = head(chunk)
        if start == 0:
            check_labels(labels, logits.shape[-1])
            leaves = other_leaves(logits, chunk)
            kept |= {leaf: torch.zeros_like(leaf) for leaf in leaves}
        with torch.no_grad():
            slope = _slope_of(logits) if logits.requires_grad else None
            _block_by_block(logits.detach(), labels[rows], seconds, losses, values, slope)
        if slope is not None:
            ends = [chunk, *leaves] if chunk.requires_grad else leaves
            found = torch.autograd.grad(logits, ends, slope)
            if watch:
                kept[hidden][rows] = found[0]
            for leaf, gradient in zip(reversed(leaves), reversed(found), strict=False):
                kept[leaf].add_(gradient)
            del found
        del seconds, logits, slope  # before the next chunk's
    sums = torch.stack([one.factor * torch.cat(parts).sum() for one, parts in zip(losses, values, strict=True)])
    if graded and kept:
        weights = tuple(one.weight for one in losses)
        sums = cast("Tensor", _WithGradients.apply(sums, weights, len(kept), *kept, *kept.values()))
    for one, value in zip(losses, sums.unbind(), strict=True):
        one.sum = value


def sum_each(
    hidden: Tensor, labels: Tensor, losses: Sequence[Summed], score: Callable[..., dict[str, Tensor]] = score_tokens
) -> None:
    """The same by one pass after another, with weights that may still change; N may be 0.

    Args:
        hidden: (N, D).
        labels: (N,).
        losses: what is asked for.
        score: `score_tokens` with its head.
    """
    for one in losses:
        settings = {"temperature": one.temperature, "beta": one.beta, "other": one.other, "chunk_size": one.chunk_size}
        found = score(hidden, labels, outputs=(one.output,), size=one.size, **settings)[one.output]
        one.sum = one.factor * found.sum()


def _slope_of(logits: Tensor) -> Tensor:
    """Room for d losses / d logits (n, V): that of the logits themselves, where their own backward looks at them no more."""
    return logits.detach() if getattr(logits.grad_fn, "forgets_logits", False) else torch.empty_like(logits)


def _block_by_block(
    logits: Tensor,
    labels: Tensor,
    seconds: Sequence[Tensor | TopK | None],
    losses: Sequence[Summed],
    values: list[list[Tensor]],
    slope: Tensor | None,
) -> None:
    """Adds a chunk's scores to ``values``, and writes d (weighted losses) / d logits into ``slope`` (n, V)."""
    for one, second in zip(losses, seconds, strict=True):
        check_logits(logits[..., : one.size], len(labels), second)
    for block in row_blocks(len(labels), logits.device):
        shared: dict[tuple[float, int | None], Distribution] = {}
        total: Tensor | None = None
        for one, second, found in zip(losses, seconds, values, strict=True):
            key = (one.temperature, one.size)
            if key not in shared:
                shared[key] = token_scores.distribution(logits[block, : one.size], one.temperature)
            p, wanted = shared[key], slope is not None and one.weight > 0
            value, by_logits = one.asked.value(
                one.output, p, second_of(second, block, one.temperature), labels[block], wanted
            )
            found.append(value)
            if by_logits is None:
                continue
            if total is None and by_logits.shape == logits[block].shape:
                total = by_logits.mul_(one.weight * one.factor)
                continue
            total = by_logits.new_zeros(logits[block].shape) if total is None else total
            total[:, : one.size].add_(by_logits, alpha=one.weight * one.factor)
        if slope is not None and total is not None:
            slope[block] = total


class _WithGradients(torch.autograd.Function):
    """Gives sums (K,) the gradient of their weighted total, which was computed before."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, weights: tuple[float, ...], count: int, *tensors: Tensor) -> Tensor:
        """The sums, as they are; ``tensors`` are ``count`` inputs and the gradient of each."""
        ctx.weights = weights
        ctx.save_for_backward(*tensors[count:])
        return sums.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each gradient times what the total is multiplied by."""
        weights = grad.new_tensor(ctx.weights)
        scale = grad.sum() / weights.sum()
        # On a GPU asking would wait for the device; there the callers' own promise holds.
        if grad.device.type == "cpu" and not torch.allclose(grad, weights * scale, rtol=1e-4, atol=0.0, equal_nan=True):
            raise RuntimeError(
                f"Losses of one pass over the head were to be weighed {list(ctx.weights)}, and their gradients are "
                f"{grad.tolist()}; let each have a pass of its own (sum_each)."
            )
        gradients = [gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, None, None, *gradients, *([None] * len(gradients))


class AddingLinear:
    """A linear layer that adds up the gradients of its weight and bias in place, where autograd would make new ones each time.

    A head's weight is as large as the logits of D tokens, so that a new gradient of it for every chunk would be the largest
    tensor of all. As under autocast, products are in the low dtype; what is added up has the dtype of the parameter.

    Attributes:
        added: parameter -> the gradient so far.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Args: linear: a layer of which `is_bare` holds."""
        weight, kind = linear.weight, linear.weight.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.weight, self.bias = weight, linear.bias
        self.low = weight.detach().to(self.dtype)
        self.low_bias = None if self.bias is None else self.bias.detach().to(self.dtype)
        trained = [p for p in (weight, self.bias) if p is not None and p.requires_grad and torch.is_grad_enabled()]
        self.added: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in trained}

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, V)."""
        return cast("Tensor", _Adding.apply(rows, self))


class _Adding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: AddingLinear) -> Tensor:
        low = rows.to(layer.dtype)
        ctx.layer, ctx.dtype, ctx.forgets_logits = layer, rows.dtype, True
        ctx.save_for_backward(low)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(low, layer.low, layer.low_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (low,) = ctx.saved_tensors
        layer: AddingLinear = ctx.layer
        with torch.autocast(grad.device.type, enabled=False):
            if (total := layer.added.get(layer.weight)) is not None:
                if total.dtype == grad.dtype:
                    total.addmm_(grad.t(), low)
                else:
                    total.add_(grad.t() @ low)
            if layer.bias is not None and (total := layer.added.get(layer.bias)) is not None:
                total.add_(grad.sum(0))
            return (grad @ layer.low).to(ctx.dtype), None


def is_bare(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a head is a linear layer and nothing else: no injected layer, no hook, no parametrisation."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(head) is nn.Linear and "forward" not in head.__dict__ and not any(getattr(head, h) for h in hooks)


__all__ = ["AddingLinear", "Summed", "is_bare", "sum_each", "sum_scores"]
