"""Named loss terms as (sum, count, unit), and the one place where a sum is divided by its window's count.

A micro-batch knows its own count, but the right divisor is the count of the whole accumulation window over all
ranks: mean over the window = sum_j s_j / sum_j c_j, which is not the mean of the micro-batch means unless all counts
agree. Loaders of this library look one window ahead and write the totals into `Batch.window`; what Lightning then
does to the loss (division by `accumulate_grad_batches`, DDP's and FSDP's mean over ranks) is undone here by a factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal

_NOMINAL = 1024.0
"""What divides a sum until its window's count is known: one number on all ranks, whose gradients are averaged, and a
power of two, which rounds nothing."""


@dataclass(frozen=True)
class Term:
    """One named term of the loss.

    Attributes:
        name: under which it is logged, e.g. ``sft``.
        sum: scalar, the sum over the units of this micro-batch, not divided by anything.
        count: how many units that was in this micro-batch.
        unit: ``token``, ``row`` or ``pair``: which of the window's counts divides the sum; ``mean`` marks a user's own
            loss that is already a mean over its micro-batch and is left as it is.
        weight: factor of the term in the total.
        own: parameters that matter to this term and, of the terms that say so, to no other, though all their graphs may hold them
            (an adapter that computes on some rows of a batch); None: nothing is known.
    """

    name: str
    sum: Tensor
    count: float
    unit: str = "token"
    weight: float = 1.0
    own: tuple[nn.Parameter, ...] | None = None

    def mean(self) -> Tensor:
        """The micro-batch's own mean, for logs; the sum itself when nothing was counted."""
        return self.sum.detach() / self.count if self.count else self.sum.detach()


@dataclass
class Window:
    """Turns terms into losses whose gradients add up to the exact mean over the accumulation window and all ranks.

    With ``totals`` in the batch, each term is divided before backward, whatever units meet. Without them (a user's own
    loader under one of our modules), sums are divided by a nominal number, the counts are collected, and
    `correction` gives the factor for the gradients before the optimizer's step: one unit only.
    """

    accumulate: int = 1
    world_size: int = 1
    _unit: str | None = field(default=None, init=False)
    counted: float = field(default=0.0, init=False)

    def loss(self, term: Term, totals: dict[str, float] | None) -> Tensor:
        """The scalar to back-propagate for one term of one micro-batch."""
        if term.unit == "mean":
            return term.weight * term.sum
        factor = float(self.accumulate * self.world_size) * term.weight
        if totals is not None:
            if term.unit not in totals:
                raise Refusal(
                    f"The term {term.name!r} counts in {term.unit}s, but the loader only counted {sorted(totals)}; "
                    "give the term a unit that the loader counts."
                )
            # A window without any unit (all rows are fillers) contributes exactly zero.
            return term.sum * (factor / totals[term.unit]) if totals[term.unit] else term.sum * 0.0
        if self._unit not in (None, term.unit):
            raise Refusal(
                f"The loader does not count its accumulation windows, so terms in {self._unit}s and in {term.unit}s "
                "cannot be normalised together; use one of this library's data modules, or one unit."
            )
        self._unit = term.unit
        return term.sum * (term.weight / _NOMINAL)

    def count(self, count: float) -> None:
        """Adds one micro-batch's count, when the loader gave no totals."""
        self.counted += count

    def correction(self) -> tuple[float, float]:
        """(this rank's count of the window, the factor's numerator), then forgets the window.

        The gradients have to be multiplied by numerator / (count summed over ranks).
        """
        counted, self.counted = self.counted, 0.0
        return counted, _NOMINAL * self.accumulate * self.world_size

    @property
    def pending(self) -> bool:
        """Whether sums were divided by a nominal number, so that gradients still need the correction."""
        return self._unit is not None

    def begin(self) -> None:
        """Forgets counts of a window that was left unfinished (a stop in mid-window)."""
        self.counted = 0.0
