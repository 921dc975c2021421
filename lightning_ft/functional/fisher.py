"""Gradients of single examples out of one backward pass, and the diagonal importances that are made of them.

The diagonal Fisher information of N examples is ``F = 1/N sum_s g_s^2`` with ``g_s`` the gradient of example s's log-likelihood:
squared after an example's tokens are summed, and before examples are (the square of a batch's mean gradient is another thing,
1/b of it at the optimum). A layer's share of ``g_s`` follows from what went in and what came back:

    linear      g_s = sum_{t in s} delta_t x_t^T        bias        g_s = sum_{t in s} delta_t
    embedding   g_s[v] = sum_{t in s, id_t = v} delta_t

so that no example needs a backward pass of its own. MAS takes ``|g_s|`` of another function in the place of ``g_s^2``.

Axes: R leading entries (rows of a batch, or tokens of a packed row), K what lies between (tokens of padded rows), S examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

Power = Literal[1, 2]
"""Of the absolute value of each gradient: 2 for the Fisher information, 1 for MAS."""


class Groups:
    """Which example each leading entry of a layer's input belongs to.

    Attributes:
        shape: the leading axes that are counted: (B,) rows, (1, T) packed tokens, (n,) tokens of a chunk.
        index: (R,) int64, the example of each entry; -1 for one that belongs to none.
        count: S, how many examples there are.
        axes: how many axes such an input has in all; None: any number.
    """

    def __init__(self, shape: Sequence[int], index: Tensor, count: int, axes: int | None = None) -> None:
        self.shape = tuple(shape)
        self.index = index
        self.count = count
        self.axes = axes

    @classmethod
    def rows(cls, count: int, device: torch.device | str = "cpu") -> Groups:
        """Each row of a batch is an example of its own."""
        groups = cls((count,), torch.arange(count, device=device), count)
        groups.__dict__["one_each"] = True
        return groups

    def fits(self, x: Tensor) -> bool:
        """Whether a layer's input begins with these axes."""
        return self.axes in (None, x.dim()) and tuple(x.shape[: len(self.shape)]) == self.shape

    @cached_property
    def one_each(self) -> bool:
        """Whether entry s is example s."""
        return len(self.index) == self.count and bool(
            (self.index == torch.arange(self.count, device=self.index.device)).all()
        )

    @cached_property
    def places(self) -> list[Tensor | slice]:
        """The entries of each example; a slice, which copies nothing, where they follow one another."""
        found: list[Tensor | slice] = []
        for s in range(self.count):
            at = (self.index == s).nonzero()[:, 0]
            first, last = (int(at[0]), int(at[-1])) if len(at) else (0, -1)
            found.append(slice(first, last + 1) if last - first + 1 == len(at) else at)
        return found

    def flat(self, x: Tensor, features: int = 1) -> Tensor:
        """(*shape, ..., *features) to (R, K, *features) in fp32 or above."""
        kept = x.shape[x.dim() - features :] if features else ()
        wide = x if not x.is_floating_point() else x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.reshape(len(self.index), -1, *kept)

    def summed(self, values: Tensor) -> Tensor:
        """(R, ...) to (S, ...): the sum over each example's entries."""
        if self.one_each:
            return values
        real = self.index >= 0
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.index[real], values[real])


def powered(grad: Tensor, power: Power) -> Tensor:
    """``g^2`` or ``|g|``."""
    return grad.square() if power == 2 else grad.abs()


class Share(ABC):
    """What one call of a layer adds to the gradient of one parameter, kept apart by example."""

    groups: Groups

    @abstractmethod
    def of(self, s: int) -> Tensor:
        """The gradient of example s, in the parameter's shape."""

    def total(self, power: Power) -> Tensor:
        """``sum_s |g_s|^power`` where this call is the parameter's only one."""
        return sum((powered(self.of(s), power) for s in range(1, self.groups.count)), powered(self.of(0), power))

    def weighted(self, weights: Tensor) -> tuple[Tensor, float]:
        """``sum_s w_s g_s`` and ``sum_s |w_s| |g_s|``, the latter of lengths, for (S,) weights."""
        return _weighted((self.of(s) for s in range(self.groups.count)), weights)


class Product(Share):
    """Of a matrix: ``g_s = factor * sum_t delta_t x_t^T``, transposed for layers that store (in, out)."""

    def __init__(
        self, x: Tensor, delta: Tensor, groups: Groups, *, factor: float = 1.0, transposed: bool = False
    ) -> None:
        """Args: x: (*shape, ..., I) inputs; delta: (*shape, ..., O) gradients of outputs; groups: their examples."""
        self.groups, self.factor = groups, factor
        left, right = groups.flat(delta), groups.flat(x)  # (R, K, O), (R, K, I)
        self._left, self._right = (right, left) if transposed else (left, right)

    @override
    def of(self, s: int) -> Tensor:
        left, right = self._sides(s)
        return self.factor * (left.t() @ right)

    @override
    def total(self, power: Power) -> Tensor:
        left, right, factor = self._left, self._right, abs(self.factor) ** power
        if self.groups.one_each:
            if left.shape[1] == 1:  # |delta x| = |delta| |x|: no example's matrix is ever formed
                return factor * (powered(left[:, 0], power).t() @ powered(right[:, 0], power))
            if self.groups.count * left.shape[-1] * right.shape[-1] <= _AT_ONCE:
                return factor * powered(torch.bmm(left.transpose(1, 2), right), power).sum(0)  # (S, O, I) for a moment
        return self._in_blocks(power).mul_(factor)

    def _in_blocks(self, power: Power) -> Tensor:
        """Block after block of the matrix: one example's part of it is written, used and overwritten in a processor's cache."""
        sides = [(left.t(), right) for left, right in map(self._sides, range(self.groups.count))]
        rows, columns = self._left.shape[-1], self._right.shape[-1]
        step = max(_CACHED // columns, 1) if self._left.device.type == "cpu" else rows
        found, held = self._left.new_zeros(rows, columns), self._left.new_empty(min(step, rows), columns)
        for top in range(0, rows, step):
            block = found[top : top + step]
            part = held[: len(block)]
            for left, right in sides:
                torch.mm(left[top : top + step], right, out=part)
                if power == 2:
                    block.addcmul_(part, part)
                else:
                    block.add_(part.abs_())
        return found

    @override
    def weighted(self, weights: Tensor) -> tuple[Tensor, float]:
        summed, size = self._left.new_zeros(self._left.shape[-1], self._right.shape[-1]), 0.0
        for s, weight in enumerate(weights.tolist()):
            left, right = self._sides(s)
            summed.addmm_(left.t(), right, alpha=self.factor * weight)
            square = ((left @ left.t()) * (right @ right.t())).sum()  # |delta^T x|^2 without the product
            size += abs(self.factor * weight) * float(square.clamp(min=0).sqrt())
        return summed, size

    def _sides(self, s: int) -> tuple[Tensor, Tensor]:
        if self.groups.one_each:
            return self._left[s], self._right[s]
        at = self.groups.places[s]
        return self._left[at].flatten(0, 1), self._right[at].flatten(0, 1)


class Values(Share):
    """Of anything: the examples' gradients themselves, (S, ...)."""

    def __init__(self, values: Tensor, groups: Groups) -> None:
        """Args: values: (S, *shape of the parameter); groups: their examples."""
        self.groups, self._values = groups, values

    @override
    def of(self, s: int) -> Tensor:
        return self._values[s]

    @override
    def total(self, power: Power) -> Tensor:
        return powered(self._values, power).sum(0)


class Lookup(Share):
    """Of a table: row v gets the deltas of the places where v was looked up."""

    def __init__(
        self, ids: Tensor, delta: Tensor, groups: Groups, rows: int, *, padding: int | None = None, scale: Tensor | None
    ) -> None:
        """Args: ids: (*shape, ...) rows looked up; delta: (*shape, ..., D); rows: of the table; padding: row that never learns."""
        self.groups, self.size = groups, rows
        self._ids = groups.flat(ids, 0)  # (R, K)
        self._delta = groups.flat(delta)  # (R, K, D)
        if scale is not None:
            self._delta = self._delta * scale
        if padding is not None:
            self._delta = self._delta.masked_fill((self._ids == padding)[..., None], 0.0)

    def _some(self, s: int) -> tuple[Tensor, Tensor]:
        """The rows that example s looked up, and their gradients."""
        at = slice(s, s + 1) if self.groups.one_each else self.groups.places[s]
        rows, where = self._ids[at].reshape(-1).unique(return_inverse=True)
        delta = self._delta[at].flatten(0, 1)
        return rows, delta.new_zeros(len(rows), delta.shape[-1]).index_add_(0, where, delta)

    @override
    def weighted(self, weights: Tensor) -> tuple[Tensor, float]:
        summed, size = self._delta.new_zeros(self.size, self._delta.shape[-1]), 0.0
        for s, weight in enumerate(weights.tolist()):
            rows, grad = self._some(s)
            summed.index_add_(0, rows, grad, alpha=weight)
            size += abs(weight) * float(grad.norm())
        return summed, size

    @override
    def of(self, s: int) -> Tensor:
        rows, grad = self._some(s)
        return grad.new_zeros(self.size, grad.shape[-1]).index_copy_(0, rows, grad)

    @override
    def total(self, power: Power) -> Tensor:
        found = self._delta.new_zeros(self.size, self._delta.shape[-1])
        for s in range(self.groups.count):
            rows, grad = self._some(s)
            found.index_add_(0, rows, powered(grad, power))
        return found


class Transposed(Share):
    """Another share, of a parameter that is stored the other way round."""

    def __init__(self, share: Share) -> None:
        """Args: share: of the transposed matrix."""
        self.groups, self._share = share.groups, share

    @override
    def of(self, s: int) -> Tensor:
        return self._share.of(s).t()

    @override
    def total(self, power: Power) -> Tensor:
        return self._share.total(power).t()

    @override
    def weighted(self, weights: Tensor) -> tuple[Tensor, float]:
        summed, size = self._share.weighted(weights)
        return summed.t(), size


def total(shares: Sequence[Share], power: Power) -> Tensor:
    """``sum_s |g_s|^power`` of a parameter that was used by several calls: their shares are added before the power."""
    if len(shares) == 1:
        return shares[0].total(power)
    examples = (gradient(shares, s) for s in range(shares[0].groups.count))
    found = powered(next(examples), power)
    for grad in examples:
        found += powered(grad, power)
    return found


def weighted(shares: Sequence[Share], weights: Tensor) -> tuple[Tensor, float]:
    """``sum_s w_s g_s`` of a parameter, and the sum of what is added up in length, which tells how exact it can be."""
    if len(shares) == 1:
        return shares[0].weighted(weights)
    return _weighted((gradient(shares, s) for s in range(shares[0].groups.count)), weights)


def _weighted(examples: Iterable[Tensor], weights: Tensor) -> tuple[Tensor, float]:
    summed, size = torch.zeros((), device=weights.device), 0.0
    for weight, grad in zip(weights.tolist(), examples, strict=True):
        summed, size = summed + weight * grad, size + abs(weight) * float(grad.norm())
    return summed, size


def gradient(shares: Sequence[Share], s: int) -> Tensor:
    """The gradient of example s with respect to a parameter that several calls used."""
    found = shares[0].of(s)
    for share in shares[1:]:
        found = found + share.of(s)
    return found


_AT_ONCE = 1 << 24
"""Numbers of examples' matrices that are held at one time: 64 MB."""
_CACHED = 1 << 17
"""Numbers that stay in the cache of a processor's core beside as many others: 512 kB."""
