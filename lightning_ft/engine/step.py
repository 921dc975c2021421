"""One training step of a module: its own terms and those of techniques, divided by the window's counts, and logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ft.engine import in_backward
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.episodes import MetaBatch
from lightning_ft.engine.step_log import StepLog
from lightning_ft.engine.terms import Term, Window
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.head_sums import Summed

if TYPE_CHECKING:
    from lightning_ft.engine.attachment import Attachment

LossTerm = Callable[[pl.LightningModule, Any, Any], Term | list[Term]]
"""(module, batch, what the module's own training_step returned) -> one or more terms."""


class Balancer(Protocol):
    """What gives the terms of a step their weights, while training."""

    def weigh(
        self, terms: list[Term], losses: list[Tensor], present: list[bool], means: dict[str, Tensor] | None
    ) -> list[Tensor]:
        """The losses to back-propagate, in the same order.

        Args:
            terms: of this micro-batch.
            losses: each divided by its window's count, times its own weight.
            present: whether the window has anything of the term's unit.
            means: name -> exact mean of a term that has anything, over the window and all ranks; in the window's last
                micro-batch, else None.
        """


class Step:
    """The terms of a run's steps.

    Attributes:
        before: called with each batch before the module's own step.
        asked: losses that the module's own step is to make of the logits that it makes anyway, see `ask`.
        extra: (name, function) of each term that techniques add.
        own: the terms that a module of ours handed over from inside its step; None for a user's own step.
        own_weight: factor of the module's own loss, which techniques beside it may make smaller.
        losses: of the present micro-batch, one for each term, as they are back-propagated.
        owned: likewise, what is each term's own.
        logged: name -> (sum, count) of each term over the window so far.
        observed: names in ``logged`` that are no terms, but what a module of ours measured beside them.
        window: what divides sums.
        balancer: what weighs the terms; None: their own weights alone.
        frees: whether gradients are dropped where a window begins; set when the module is wrapped.
        muted: whether the module's own step runs on rows of which nothing is logged, see `Attachment.rerun`.
        watchers: called with the terms and their exact means when a window is complete.
    """

    def __init__(self, attachment: Attachment) -> None:
        """Args: attachment: whose module steps."""
        self.attachment = attachment
        self.before: list[Callable[[Any], None]] = []
        self.asked: list[Summed] = []
        self.extra: list[tuple[str, LossTerm]] = []
        self.own: list[Term] | None = None
        self.own_weight = 1.0
        self.losses: list[Tensor] = []
        self.owned: list[tuple[nn.Parameter, ...] | None] = []
        self.logged: dict[str, tuple[Tensor, float]] = {}
        self.observed: set[str] = set()
        self.finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
        self.window = Window()
        self.balancer: Balancer | None = None
        self.muted = False
        self.frees = False
        self.watchers: list[Callable[[list[Term], dict[str, Tensor]], None]] = []
        self._to_logger = StepLog()

    def begin_window(self) -> None:
        """Forgets what was counted, where an accumulation window begins."""
        self.logged, self.observed = {}, set()
        if self.attachment.term_gradients is not None:
            self.attachment.term_gradients.forget()
        self.window.begin()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        """Drops what the last window has left, which Lightning would keep through the forward pass and zero before backward."""
        if self.frees:
            for optimizer in self.attachment.trainer.optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    def ask(self, loss: Summed) -> None:
        """Before a step: asks for a loss of the logits that a language model's own loss is made of, in one pass over its head.

        Not where terms are weighed or differentiated one by one: who has asked finds no ``sum`` then, as where a module makes no
        such pass, and makes one of its own.
        """
        if self.balancer is None and self.attachment.term_gradients is None:
            self.asked.append(loss)

    def together(self, *, trains_head: bool) -> list[Summed]:
        """The losses of one pass over a language model's head: its step's log-likelihood, and all that was asked for.

        None where terms are weighed or differentiated one by one, and where taking the gradient on the way gains nothing: of one
        loss and a frozen head.

        Args:
            trains_head: whether anything in the head is trained.
        """
        asked, self.asked = self.asked, []
        apart = self.muted or self.balancer is not None or self.attachment.term_gradients is not None
        if apart or not (asked or (trains_head and self.own_weight > 0)):
            return []
        return [Summed(weight=self.own_weight), *asked]

    def observe(self, values: Mapping[str, tuple[Tensor, Tensor | float]]) -> None:
        """Adds name -> (sum, how many it was summed over) of a micro-batch to what is logged of its window."""
        if self.muted:  # another batch than the one that is trained
            return
        for name, (value, count) in values.items():
            before, counted = self.logged.get(name, (0.0, 0.0))
            self.logged[name] = (before + value.detach().float(), counted + count)  # type: ignore[assignment]
        self.observed |= values.keys()

    def total(self, batch: Any, output: Any) -> Any:
        """The module's own loss plus every registered term, divided by the window's counts."""
        own = self.own
        listens = self.extra or self.watchers or self.balancer is not None or self.attachment.term_gradients is not None
        if own is None and not listens:
            return output
        loss = output["loss"] if isinstance(output, Mapping) else output
        terms = list(own) if own is not None else ([] if loss is None else [Term("loss", loss, 1.0, unit="mean")])
        if self.own_weight != 1.0:
            terms = [replace(term, weight=term.weight * self.own_weight) for term in terms]
        for _, function in self.extra:
            made = function(self.attachment.module, batch, output)
            extra = made if isinstance(made, list) else [made]
            if own is None:  # a user's own step keeps Lightning's mean, and so do the terms beside it
                extra = [Term(t.name, t.sum / max(t.count, 1.0), 1.0, "mean", t.weight) for t in extra]
            terms += extra
        if not terms:
            return output
        totals = batch.window if isinstance(batch, (Batch, MetaBatch)) else None
        losses = [self.window.loss(term, totals) for term in terms]
        if totals is None and terms[0].unit != "mean":
            in_backward.refuse_uncounted(self.attachment.trainer)
            counts = {term.count for term in terms}
            if len(counts) > 1:
                raise Refusal(
                    "The loader does not count its windows and two loss terms count differently; use one of this "
                    "library's data modules."
                )
            self.window.count(terms[0].count)
        self._add(terms)
        wanted = (self.balancer is not None or self.watchers) and not self._accumulates
        means = self._means(terms) if wanted else None
        for watch in self.watchers if means is not None else ():
            watch(terms, means or {})
        if self.balancer is not None:
            present = [totals is None or totals.get(term.unit, 1.0) > 0 for term in terms]
            losses = self.balancer.weigh(terms, losses, present, means)
        self.losses, self.owned = losses, [term.own for term in terms]
        self._log(terms, totals, skip_own=own is None)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    @property
    def _accumulates(self) -> bool:
        """Whether the window goes on after this micro-batch."""
        return bool(self.attachment.trainer.fit_loop.epoch_loop._should_accumulate())

    def _add(self, terms: list[Term]) -> None:
        """Adds the sums and counts of a micro-batch to those of its window."""
        for term in terms:
            before, count = self.logged.get(term.name, (0.0, 0.0))
            self.logged[term.name] = (before + term.sum.detach().float(), count + term.count)  # type: ignore[assignment]

    def _means(self, terms: list[Term]) -> dict[str, Tensor]:
        """The exact mean of each term that has anything, over the window so far and all ranks."""
        device = self.attachment.module.device
        both = [torch.as_tensor(n, dtype=torch.float64, device=device) for t in terms for n in self.logged[t.name]]
        sums = torch.stack(both).reshape(-1, 2)  # (K, 2)
        if self.attachment.ranks > 1:
            dist.all_reduce(sums)
        named = zip(terms, sums, strict=True)
        return {term.name: value / count for term, (value, count) in named if float(count) > 0}

    def _log(self, terms: list[Term], totals: dict[str, float] | None, *, skip_own: bool) -> None:
        """Logs each term's exact mean over the window once it is complete, and for our modules their weighted sum.

        Not a number for one of several terms that the window has no unit of.
        """
        if self._accumulates:
            return
        if totals is not None and not all(term.unit in totals for term in terms):
            totals = None  # a user's own step: its loss is a mean already
        means: dict[str, Tensor] = {}
        for term in terms:
            value, count = self.logged[term.name]
            means[term.name] = value / max(totals[term.unit] if totals is not None else count, 1.0)
        if skip_own:
            means.pop("loss", None)
        elif len(terms) == 1:
            means = {"loss": terms[0].weight * means[terms[0].name]}
        else:
            means["loss"] = torch.stack([term.weight * means[term.name] for term in terms]).sum()
            if totals is not None:  # of a task that the window lacks there is nothing to tell, and 0 is no loss
                absent = [term.name for term in terms if not totals[term.unit]]
                means |= {name: torch.full_like(means[name], math.nan) for name in absent}
        attachment = self.attachment
        if self.observed:
            self._log_observed()
        # Sums over ranks divided by counts over ranks: summing the shares is exact; without totals ranks are averaged.
        reduce = "sum" if totals is not None else "mean"
        for name, mean in means.items():
            self._to_logger(
                attachment.module,
                f"train/{name}",
                mean,
                prog_bar=name == "loss",
                sync_dist=attachment.ranks > 1,
                reduce_fx=reduce,
            )

    def _log_observed(self) -> None:
        """Means over the window and all ranks, by one reduction; not a number where nothing was counted."""
        module = self.attachment.module
        names = sorted(self.observed)
        both = [torch.as_tensor(n, dtype=torch.float32, device=module.device) for x in names for n in self.logged[x]]
        sums = torch.stack(both).reshape(-1, 2)  # (K, 2)
        if self.attachment.ranks > 1:
            dist.all_reduce(sums)
        for name, mean in self.finish(dict(zip(names, sums[:, 0] / sums[:, 1], strict=True))).items():
            self._to_logger(module, f"train/{name}", mean)
