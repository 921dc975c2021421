"""Loss balancing: the weights of several loss terms, fixed, learned, or following how they fall."""

from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_ft.engine.arguments import refuse_idle
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.task_list import refuse_one_task_a_step
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.loss_balancing import dwa_weights, famo_slope, famo_weights, gradnorm_slope, uncertainty
from lightning_ft.nn.log_variances import LogVariances

Method = Literal["static", "uncertainty", "dwa", "gradnorm", "famo"]
_BETAS, _EPS = (0.9, 0.999), 1e-8
_USED_BY = {
    "weights": ("static",),
    "terms": ("uncertainty",),
    "squared": ("uncertainty",),
    "temperature": ("dwa",),
    "every_steps": ("dwa",),
    "alpha": ("gradnorm",),
    "lr": ("uncertainty", "gradnorm", "famo"),
}


class LossBalancing(Technique):
    """Weighs the terms of a loss (the tasks of `MultiTask`, say) against one another while training.

    The weights multiply what each term brings (its mean over the accumulation window and all ranks, times its own weight):

        static       w_k as given
        uncertainty  m_k exp(-s_k) L_k + s_k / 2 with s_k = log sigma_k^2 learned beside the model; m_k is 1/2 for the tasks named
                     in ``squared`` (regressions) and 1 for others. It may become negative.
        dwa          K softmax(r_k / T), r_k = L_k(t - 1) / L_k(t - 2): terms that fall slowly weigh more
        gradnorm     weights that give all terms gradients of a like length, those that lag longer ones; sum K
        famo         weights by which the logarithms of all losses fall alike; sum 1

    Args:
        method: which.
        weights: of static: name of a term -> its weight; 1 where none is given.
        terms: of uncertainty: names of the terms, which must be known before the optimizer is built; None asks `MultiTask`.
        squared: of uncertainty: names of the terms that are squared errors; None asks `MultiTask`.
        temperature: of dwa: the paper's 2; larger ones make the weights alike.
        every_steps: of dwa: optimizer steps a period, whose mean losses are compared; None is an epoch, as in the paper, which is
            too long for a run of three.
        alpha: of gradnorm: pull on terms that lag; the paper's 1.5 for tasks that differ much, 0.12 for like ones.
        lr: peak rate of what the method learns: gradnorm's and famo's weights, by Adam (famo's authors: 0.025); uncertainty's s,
            in a group of its own of our modules' optimizer, whatever the model's rate is, which would hardly move it.
        name: tells it apart in files.

    Logs:
        ``train/weight/<term>``: the factor of each term in a step.

    Cost: gradnorm one backward pass a term and K gradients of what is trained, as surgery; the others nothing.

    Differs from: GradNorm's paper, which measures gradients at the last shared layer: here on all that is trained and shared. Where
    a window lacks some terms, the weights of the others keep the sum that they had, and the s of those that it lacks rest, whatever
    momentum the optimizer has.
    FAMO's, which runs the batch a second time after the step: here the next batch's losses stand for that, so that other rows'
    noise is in the difference.

    Raises:
        Refusal: for arguments that the method does not read; at setup for a task that is not there, terms without names, famo with
            accumulation, gradnorm or famo where each step holds one task, gradnorm or uncertainty under FSDP2; in the first step
            for other terms that are not there; for an optimizer of your own that would decay the variances.

    Example:
        >>> LossBalancing("dwa", every_steps=100)
        LossBalancing(method='dwa', every_steps=100)

    References:
        Kendall et al., 2018, equation 10; Liu et al., 2019 (DWA); Chen et al., 2018 (GradNorm); Liu et al., 2023 (FAMO). Proven
        against the formulas, autograd and known noise in tests/functional and tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="balancing",
        edits=frozenset({"loss"}),
        needs=frozenset({"terms"}),
        keeps="of uncertainty the variances, parameters of the module",
        alone=True,
    )

    def __init__(
        self,
        method: Method = "uncertainty",
        *,
        weights: dict[str, float] | None = None,
        terms: list[str] | None = None,
        squared: list[str] | None = None,
        temperature: Annotated[float, Gt(0)] = 2.0,
        every_steps: Annotated[int, Ge(1)] | None = None,
        alpha: Annotated[float, Ge(0)] = 1.5,
        lr: Annotated[float, Gt(0)] = 0.025,
        name: str = "balancing",
    ) -> None:
        self.method = method
        self.weights = weights
        self.terms = terms
        self.squared = squared
        self.temperature = temperature
        self.every_steps = every_steps
        self.alpha = alpha
        self.lr = lr
        self.name = name
        self.check()
        refuse_idle(self, _USED_BY, method)
        self._attachment: Attachment | None = None
        self._names: list[str] = []
        self._order: tuple[str, ...] = ()
        self._absent: set[str] = set()
        self._restored = False
        self._forget_history()

    def _forget_history(self) -> None:
        self._first: dict[str, Tensor] = {}  # mean losses of the first window
        self._last: dict[str, Tensor] = {}  # of the last window (famo, gradnorm)
        self._sums: dict[str, Tensor] = {}  # of the period, (sum, windows)
        self._periods: list[dict[str, Tensor]] = []  # mean losses of the last two periods
        self._learned: dict[str, Tensor] = {}  # (4,): value, Adam's two moments and count
        self._windows = 0

    # -- registration -----------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """Weighs the terms; uncertainty adds its parameter, gradnorm takes the place of the sum of gradients."""
        self._attachment = attachment
        attachment.on_leave(self._leave_run)
        if attachment.module._trainer is not None:  # else `lightning_ft.load` only rebuilds what was trained
            self._check_run(attachment)
        attachment.balance(self)
        if self.method == "gradnorm":
            attachment.surgery(self._gradnorm, weighs_own=True)
        if self.method == "uncertainty":
            self._names = self._named(attachment.module)
            attachment.gradient_edit(self)
            attachment.edit("inject", "balancing", self._inject, again=True)

    def _leave_run(self) -> None:
        self._attachment = None

    def _check_run(self, attachment: Attachment) -> None:
        trainer = attachment.trainer
        if self.method == "famo" and trainer.accumulate_grad_batches > 1:
            raise Refusal(
                "LossBalancing famo cannot work with accumulation, because its weights come from the losses of the whole window, "
                "which are not known before the first of its backward passes; set accumulate_grad_batches to 1, or take dwa."
            )
        if self.method in ("uncertainty", "gradnorm") and isinstance(trainer.strategy, ModelParallelStrategy):
            raise Refusal(
                f"LossBalancing {self.method} cannot work with FSDP2, because what it learns would be sharded; use ddp, or dwa."
            )
        if self.method in ("gradnorm", "famo"):
            refuse_one_task_a_step(trainer, f"LossBalancing {self.method}")
        tasks = getattr(attachment.module, "task_names", None)
        others = any("loss" in technique.traits.edits for technique in attachment.techniques if technique is not self)
        if tasks and not others:  # else their terms have names of their own, which the first step tells
            self._check_names(list(tasks))

    def _check_names(self, names: list[str]) -> None:
        unknown = sorted({*(self.weights or {}), *(self.squared or [])} - set(names))
        if unknown:
            what = "weights" if unknown[0] in (self.weights or {}) else "squared"
            raise Refusal(f"LossBalancing.{what} names {unknown[0]!r}, and the step's terms are {', '.join(names)}.")

    def _named(self, module: pl.LightningModule) -> list[str]:
        names = self.terms if self.terms is not None else getattr(module, "task_names", None)
        if not names:
            raise Refusal(
                f"LossBalancing uncertainty learns a number for each term, and {type(module).__name__} does not say which it has; "
                f"name them (balancing.terms), as train/<name> is logged."
            )
        return list(names)

    def _inject(self, module: pl.LightningModule) -> None:
        """The module's numbers of this run's terms: those of an earlier run go on, a task that was added begins at 0."""
        there = getattr(module, "balancing", None)
        if isinstance(there, LogVariances):
            if module._trainer is not None and module._trainer.state.fn == "fit":
                there.take_(self._names)
        else:
            module.add_module("balancing", LogVariances(self._names).to(module.device))
        resolved = getattr(module, "resolved_lr", None)
        if self._attachment is not None and callable(resolved) and module._trainer is not None:
            names = [f"balancing.{name}" for name, _ in module.get_submodule("balancing").named_parameters()]
            self._attachment.rates.update(dict.fromkeys(names, self.lr / resolved()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses an optimizer that would pull the variances to 1, or not move them."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 and not self._restored:
            self._forget_history()
        self._restored = False
        if self.method != "uncertainty":
            return
        for parameter in pl_module.get_submodule("balancing").parameters():
            groups = [g for o in trainer.optimizers for g in o.param_groups if any(p is parameter for p in g["params"])]
            if not groups or any(group.get("weight_decay") for group in groups):
                what = "decays" if groups else "lacks"
                raise Refusal(
                    f"The optimizer {what} the parameters of module.balancing, whose size means something; put them into a group "
                    "of their own with weight_decay 0 in configure_optimizers."
                )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends dwa's period, where that is the epoch."""
        if self.method == "dwa" and self.every_steps is None:
            self._end_period()

    # -- the step ---------------------------------------------------------------------------------------------------

    def weigh(
        self, terms: list[Term], losses: list[Tensor], present: list[bool], means: dict[str, Tensor] | None
    ) -> list[Tensor]:
        """The losses times their weights; see `lightning_ft.engine.step.Balancer`."""
        names = [term.name for term in terms]
        self._order = tuple(names)
        self._check_names(names)
        if self.method == "uncertainty":
            return self._uncertain(terms, losses, present, last=means is not None)
        factors = self._factors(names, means)
        weighed = [loss if factor == 1.0 else loss * factor for loss, factor in zip(losses, factors, strict=True)]
        if means is not None:
            if self.method != "gradnorm":
                self._log(names, factors)
            self._remember({name: value.detach().cpu() for name, value in means.items()})
        return weighed

    def _factors(self, names: list[str], means: dict[str, Tensor] | None) -> list[float]:
        if self.method == "static":
            return [float((self.weights or {}).get(name, 1.0)) for name in names]
        if self.method == "dwa" and len(self._periods) == 2:
            known = [name for name in names if all(name in period for period in self._periods)]
            before, last = (torch.stack([period[name] for name in known]) for period in self._periods)
            found = dict(zip(known, dwa_weights(before, last, self.temperature).tolist(), strict=True)) if known else {}
            return [found.get(name, 1.0) for name in names]
        if self.method == "famo" and means:
            known = [name for name in names if name in means]
            now = torch.stack([means[name].cpu() for name in known])
            seen = [i for i, name in enumerate(known) if name in self._last]
            if seen:
                logits = self._values([known[i] for i in seen], 0.0)
                before = torch.stack([self._last[known[i]] for i in seen])
                self._descend([known[i] for i in seen], famo_slope(logits, before, now[seen]))
            weights = famo_weights(self._values(known, 0.0), now).tolist()
            found = dict(zip(known, weights, strict=True))
            return [found.get(name, 1.0) for name in names]
        return [1.0] * len(names)

    def _uncertain(self, terms: list[Term], losses: list[Tensor], present: list[bool], *, last: bool) -> list[Tensor]:
        names, attachment = [term.name for term in terms], self._attachment
        assert attachment is not None
        if names != self._names:
            raise Refusal(
                f"LossBalancing.terms are {self._names}, but the step's terms are {names}; name those, in this order."
            )
        if attachment.step.window.pending:
            raise Refusal(
                "LossBalancing uncertainty adds s / 2 once a window, and this loader does not count its windows; use one of this "
                "library's data modules."
            )
        found: LogVariances = attachment.module.get_submodule("balancing")  # type: ignore[assignment]
        squared = self.squared if self.squared is not None else getattr(attachment.module, "squared_tasks", [])
        self._absent = {name for name, here in zip(names, present, strict=True) if not here}
        weighed = []
        for term, loss, here, s in zip(terms, losses, present, found.log_variance, strict=True):
            # Lightning divides each micro-batch by their nominal number: the last one alone has the whole s / 2, since a window
            # may be short. A user's own mean loses as much there as its s / 2.
            times = 1.0 if term.unit == "mean" else float(last) * attachment.trainer.accumulate_grad_batches
            share = torch.tensor(0.5 if term.name in squared else 1.0, device=s.device)
            weighed.append(uncertainty(loss, s, share) + (times * term.weight * here - 1.0) * 0.5 * s)
        if last:
            factors = [0.5 if name in squared else 1.0 for name in names]
            self._log(names, [m * float(torch.exp(-s)) for m, s in zip(factors, found.values, strict=True)])
        return weighed

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        """The s of a term that the window lacks rests, as a task's head does: an optimizer's momentum would move it."""
        assert self._attachment is not None
        found: LogVariances = self._attachment.module.get_submodule("balancing")  # type: ignore[assignment]
        for name, s in zip(found.names, found.log_variance, strict=True):
            if name in self._absent:
                s.grad = None

    def _gradnorm(self, gram: Tensor) -> Tensor:
        """(K, K) -> (K,): the present weights, after a step of their own from the window's gradients and losses."""
        names = list(self._order)
        weights = self._values(names, 1.0)
        norms = gram.diagonal().cpu().sqrt()
        known = [
            i for i, name in enumerate(names) if float(norms[i]) > 0 and name in self._first and name in self._last
        ]
        if len(known) > 1:
            now, first = (torch.stack([kept[names[i]] for i in known]) for kept in (self._last, self._first))
            self._descend(
                [names[i] for i in known],
                gradnorm_slope(weights[known], norms[known], now, first, self.alpha),
                scale=True,
            )
            weights = self._values(names, 1.0)
        self._log(names, weights.tolist())
        return weights

    # -- what is learned and remembered -------------------------------------------------------------------------------

    def _values(self, names: list[str], start: float) -> Tensor:
        return torch.stack(
            [self._learned.get(n, torch.tensor([start, 0.0, 0.0, 0.0], dtype=torch.float64))[0] for n in names]
        )

    def _descend(self, names: list[str], slope: Tensor, *, scale: bool = False) -> None:
        """One step of Adam on each number, then, if asked, all scaled to the sum that they had."""
        total = float(self._values(names, float(scale)).sum())
        for name, g in zip(names, slope.double().tolist(), strict=True):
            kept = self._learned.get(name, torch.tensor([float(scale), 0.0, 0.0, 0.0], dtype=torch.float64))
            value, m, v, t = kept.tolist()
            m, v, t = _BETAS[0] * m + (1 - _BETAS[0]) * g, _BETAS[1] * v + (1 - _BETAS[1]) * g * g, t + 1
            step = self.lr * (m / (1 - _BETAS[0] ** t)) / ((v / (1 - _BETAS[1] ** t)) ** 0.5 + _EPS)
            self._learned[name] = torch.tensor([value - step, m, v, t], dtype=torch.float64)
        if scale:
            for name in names:  # a weight at or below zero would train a task away from its answers
                self._learned[name][0].clamp_(min=1e-3)
            factor = total / float(self._values(names, 1.0).sum())
            for name in names:
                self._learned[name][0] *= factor

    def _remember(self, means: dict[str, Tensor]) -> None:
        for name, value in means.items():
            self._first.setdefault(name, value)
            self._last[name] = value
            before = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
            self._sums[name] = before + torch.stack([value.double(), torch.ones((), dtype=torch.float64)])
        self._windows += 1
        if self.method == "dwa" and self.every_steps is not None and self._windows % self.every_steps == 0:
            self._end_period()

    def _end_period(self) -> None:
        if self._sums:
            self._periods = [*self._periods, {name: both[0] / both[1] for name, both in self._sums.items()}][-2:]
            self._sums = {}

    def _log(self, names: list[str], factors: list[float]) -> None:
        assert self._attachment is not None
        for name, factor in zip(names, factors, strict=True):
            self._attachment.module.log(f"train/weight/{name}", factor)

    def state_dict(self) -> dict[str, Any]:
        """The history that the weights follow, and what is learned of them."""
        return {
            "first": dict(self._first),
            "last": dict(self._last),
            "sums": dict(self._sums),
            "periods": [dict(period) for period in self._periods],
            "learned": {name: kept.clone() for name, kept in self._learned.items()},
            "windows": self._windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the history of the checkpoint."""
        self._first, self._last, self._sums = (dict(state_dict[key]) for key in ("first", "last", "sums"))
        self._periods = [dict(period) for period in state_dict["periods"]]
        self._learned = {name: kept.clone() for name, kept in state_dict["learned"].items()}
        self._windows = state_dict["windows"]
        self._restored = True
