"""The gradient pipeline: gradient surgery, then closed-form penalties, between unscaling and clipping.

It runs on the module instance's ``on_before_optimizer_step``, not a callback's: tuners replace the callback list.
Edits write in place, because a copy of the gradients would double their memory, but get everything as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_ft.functional.errors import Refusal

Surgery = Callable[[Tensor], Tensor]
"""A map from the (K, K) Gram matrix of the K terms' gradients, float64, to K weights of their combination.

The matrix is that of the parameters that at least two terms reach; a term that has nothing in a window has a row of zeros.
"""


class GradientEdit(Protocol):
    """A closed-form edit of the gradients, once per optimizer step, the same on every rank."""

    name: str

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        """Adds to ``p.grad`` of the trained parameters, by name."""


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` laid out as ``parameter`` is: sharded under FSDP2, on its device and in fp32 otherwise."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def scale_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies every gradient in place."""
    grads = [p.grad for p in parameters if p.grad is not None]
    for grad in grads:
        grad.mul_(factor)


class TermGradients:
    """The gradients of K terms, kept apart as rows over an accumulation window, then combined by a surgery.

    The rows are (K, P) in at least fp32 with P trained numbers: memory K times that of the trained parameters, for the whole run.
    Parameters that one term alone reaches (a head of its own) are no matter of compromise: they are not in the Gram matrix, and
    keep its gradient, unless the weights are ``weighs_own``, of the losses as a whole.
    """

    def __init__(self, surgery: Surgery, *, weighs_own: bool = False) -> None:
        """Args: surgery: maps the (K, K) Gram matrix to K weights. weighs_own: also of what one term alone reaches."""
        self.surgery = surgery
        self.weighs_own = weighs_own
        self._rows: Tensor | None = None  # kept from window to window: it is large, and new memory is slow
        self._reached: Tensor | None = None  # (K, number of parameters); None where a window begins

    def accumulate(
        self,
        losses: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        own: Sequence[Collection[nn.Parameter] | None] | None = None,
    ) -> None:
        """Adds one micro-batch's gradients, one row a term.

        Args:
            losses: K scalars, already divided as they will be stepped with.
            parameters: the trained parameters, in an order that does not change.
            own: of each term what is its own, as `lightning_ft.engine.terms.Term` has it: a term that says so does not reach what
                is another's, though its graph may (with a gradient of zero).
        """
        mine = [None if one is None else {id(p) for p in one} for one in own or [None] * len(losses)]
        anyones = set().union(*(one for one in mine if one is not None))
        begins, ends = self._make_room(losses, parameters), np.cumsum([p.numel() for p in parameters]).tolist()
        assert self._rows is not None
        reached = torch.zeros(len(losses), len(parameters))
        grads: tuple[Tensor | None, ...]
        last = max((index for index, loss in enumerate(losses) if loss.requires_grad), default=-1)
        for index, loss in enumerate(losses):
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, parameters, retain_graph=index < last, allow_unused=True)
            else:
                grads = (None,) * len(parameters)
            theirs = anyones - here if (here := mine[index]) is not None else set()
            reached[index] = torch.tensor(
                [float(g is not None and id(p) not in theirs) for g, p in zip(grads, parameters, strict=True)]
            )
            for grad, parameter, end in zip(grads, parameters, ends, strict=True):
                place = self._rows[index, end - parameter.numel() : end].view_as(parameter)
                if begins:
                    place.zero_() if grad is None else place.copy_(grad)
                elif grad is not None:
                    place.add_(grad)
        reached = reached.to(self._rows.device)
        self._reached = reached if self._reached is None else self._reached + reached

    def _make_room(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> bool:
        """Makes room for (K, P) numbers, at least float32, where there is none; whether a window begins."""
        wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        dtype = torch.float64 if torch.float64 in wide else torch.float32
        shape, device = (len(losses), sum(p.numel() for p in parameters)), parameters[0].device
        rows = self._rows
        if rows is None or rows.shape != shape or rows.dtype != dtype or rows.device != device:
            if self._reached is not None:
                raise Refusal(
                    "What is trained, or the number of the loss's terms, has changed within an accumulation window."
                )
            self._rows = torch.empty(shape, dtype=dtype, device=device)
        return self._reached is None

    def write_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages the rows over ranks, combines them and writes the result to ``p.grad``.

        A parameter that no term reached on any rank keeps no gradient, so that `audit` can name it.
        """
        if self._rows is None or self._reached is None:
            return
        rows, reached = self._rows, self._reached
        self.forget()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(rows)
            dist.all_reduce(reached)
            rows /= dist.get_world_size()
        terms = (reached > 0).sum(0).tolist()  # how many reach each parameter
        ends = np.cumsum([p.numel() for p in parameters]).tolist()
        pieces = [rows[:, end - p.numel() : end] for p, end in zip(parameters, ends, strict=True)]  # (K, numel) each
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for piece, count in zip(pieces, terms, strict=True):
            if count > 1:
                gram += (piece @ piece.T).double()
        weights = self.surgery(gram).to(rows)  # (K,)
        for parameter, piece, count in zip(parameters, pieces, terms, strict=True):
            combined = weights @ piece if count > 1 or self.weighs_own else piece.sum(0)
            parameter.grad = combined.view_as(parameter).to(parameter.dtype) if count else None

    def forget(self) -> None:
        """Drops what rows of a window hold that was left unfinished."""
        self._reached = None

    def state(self) -> dict[str, Tensor] | None:
        """The rows of an unfinished window, for a checkpoint; None on a window's boundary."""
        if self._rows is None or self._reached is None:
            return None
        return {"rows": self._rows.clone(), "reached": self._reached.clone()}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Goes on with the rows that `state` gave."""
        self._rows, self._reached = state["rows"].to(device), state["reached"].to(device)


def audit(module: nn.Module, conditional: set[str]) -> None:
    """After the first window: every trained parameter has a gradient, nothing frozen has one.

    Args:
        module: whose parameters are checked.
        conditional: names that their owner declared to be without a gradient at times.

    Raises:
        Refusal: naming up to five parameters that break this.
    """
    without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None and n not in conditional]
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None]
    if without:
        raise Refusal(
            f"{len(without)} trainable parameters got no gradient in the first window: {_some(without)}; the loss does not "
            "depend on them. Freeze them (requires_grad False, or the freeze slot), or make the step use them."
        )
    if frozen:
        raise Refusal(
            f"{len(frozen)} frozen parameters got a gradient: {_some(frozen)}; something thawed and refroze them mid-window."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
