"""The base of modules with an inner loop: which weights adapt, at which rates, and what is measured before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.episode_checks import check_outputs
from lightning_ft.engine.episode_objective import ObjectiveModule
from lightning_ft.engine.episode_tasks import Features, features_of
from lightning_ft.engine.episodes import Episode, MetaBatch, Rows
from lightning_ft.engine.fewer_classes import cut_classes_
from lightning_ft.engine.freezing import parameters_named
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.inner_loop import Order, Weights, by_autograd, by_transform, inner_loop
from lightning_ft.functional.inner_optimizers import descend
from lightning_ft.nn.double_backward import (
    check_graph,
    check_net,
    compiled,
    explained,
    no_checkpointing,
    twice_differentiable,
)
from lightning_ft.nn.registry import injected_layers
from lightning_ft.nn.sparse_embeddings import sparse_embeddings

Inner = Literal["all", "head", "adapter", "adapter_and_head"]
Tasks = Literal["auto", "at_once", "one_by_one"]
MEASURED = (0, 1, 5, 10)
"""Numbers of inner steps after which papers report: before adapting, after training's one or five, and beyond them."""


class AdaptingModule(ObjectiveModule):
    """Subclasses store ``inner``, ``steps``, ``inner_lr``, ``eval_steps``, ``tasks``, and what `ObjectiveModule` says."""

    inner: Inner | list[str]
    steps: int
    inner_lr: float
    eval_steps: list[int] | None
    tasks: Tasks
    order: Order = 1
    implicit: float | None = None
    """Strength of a pull to the start in the inner loss; None: there is none."""

    inner_names: list[str]
    _at_once: bool | None = None
    _tied = True
    _looked_at = False
    _splits = False

    # -- what adapts --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Finds the weights of the inner loop, once everything is injected, and refuses nets that cannot have one."""
        super()._prepare()
        if (
            self._compiler_ctx is not None
        ):  # Lightning has taken the module out, and left its forward and steps compiled
            raise compiled(type(self).__name__, "the whole module")
        check_net(self.model, order=self.order if self.implicit is None else 2, owner=type(self).__name__)
        parameters = dict(self.named_parameters())
        self._tied = len(parameters) != len(list(self.named_parameters(remove_duplicate=False)))
        late = Attachment.of(self).late  # thawed during the run: they adapt from then on
        wanted = [name for name in parameters if name in self._wanted()]
        self.inner_names = [name for name in wanted if parameters[name].requires_grad or name in late]
        if not self.inner_names:
            raise Refusal(
                f"{type(self).__name__}.inner {self.inner!r} names nothing that is trained, so no task could be adapted to; "
                + (
                    "add LoRA, a prefix or another adapter."
                    if "adapter" in str(self.inner)
                    else "thaw it, or take another."
                )
            )
        self._at_once, self._looked_at = None, False
        self._splits = self._only_the_head()

    def _only_the_head(self) -> bool:
        """Whether nothing before a base's head adapts, so that what the head reads is computed once for all inner steps."""
        if self.base is None or self.implicit is not None or (self.writes and self._tied):
            return False
        parameters, head = dict(self.named_parameters()), self._head()
        if any(id(parameters[name]) not in head for name in self.inner_names):
            return False
        # Of a padded encoder the head's own way is taken, unless it is known to look at no other token.
        by_row = self.loads in ("sequence_classification", "regression") and self.view.encoder
        return not by_row or bool(self.admission is not None and self.admission.packing)

    def read(self, rows: Rows, *, graph: bool) -> Tensor | Batch | Features:
        """The inputs of rows; as the head reads them, where nothing else adapts.

        Args:
            rows: what they are.
            graph: whether what is before the head learns from them.
        """
        if not self._splits or not isinstance(rows.inputs, Batch):
            return rows.inputs
        with nullcontext() if graph else torch.no_grad():
            return features_of(self.task, self.view, self.laid(rows.inputs))

    def _wanted(self) -> set[str]:
        """Names of all parameters that ``inner`` means."""
        ids: set[int] = set()
        injected = {
            f"{path}.{name}" for path, layer in injected_layers(self).items() for name in layer.injected_parameters()
        }
        if isinstance(self.inner, list):
            ids = {id(p) for p in parameters_named(self.model, self.inner).values()}
        elif self.inner in ("head", "adapter_and_head"):
            ids = self._head()
        everything = {name for name, p in self.named_parameters() if self.inner == "all" or id(p) in ids}
        return everything | (injected if self.inner in ("adapter", "adapter_and_head") else set())

    def _head(self) -> set[int]:
        if self.base is None:
            return {id(p) for p in parameters_named(self.model, ["head"]).values()}
        if self.writes:  # a language head, whatever it is asked
            return {id(p) for p in self.view.head_parameters()}
        own = dict(self.model.named_parameters())
        return {id(own[name]) for name in self.view.head_parameter_names()}

    def start(self) -> Weights:
        """The weights that the inner loop begins with, by name; the parameters themselves."""
        parameters = dict(self.named_parameters())
        return {name: parameters[name] for name in self.inner_names if parameters[name].requires_grad}

    def start_without_graph(self) -> Weights:
        """The same, through which nothing is learned."""
        return {name: weight.detach() for name, weight in self.start().items()}

    @property
    def fixed_rate(self) -> float | None:
        """That of every weight and step, if it is not learned."""
        return self.inner_lr

    def step_rates(self, step: int) -> Mapping[str, Tensor | float]:
        """The rate of each of them at a step of the inner loop, from 0."""
        return dict.fromkeys(self.inner_names, self.inner_lr)

    # -- a task -------------------------------------------------------------------------------------------------------

    def outputs(self, weights: Mapping[str, Tensor], inputs: Tensor | Batch | Features) -> Tensor:
        """What the model gives for rows with some of its weights replaced."""
        found: Tensor = functional_call(self, dict(weights), (inputs,), tie_weights=self._tied)
        return found

    def adapted(
        self,
        support: Rows,
        *,
        steps: int,
        order: Order,
        theta: Weights | None = None,
        transform: bool = False,
    ) -> Iterator[Weights]:
        """The weights of a task before its first step and after each.

        Args:
            support: the rows to adapt on.
            steps: how many.
            order: of the graph that is kept through them.
            theta: the start; None: `start`, with its graph. Where no weight of it has one, and none goes through the steps,
                a step changes the weights of the one before in place.
            transform: for use inside `torch.vmap`.
        """
        guard: Callable[[], AbstractContextManager[Any]]
        owner = type(self).__name__
        guard = nullcontext if transform else (lambda: no_checkpointing(owner))
        attention = twice_differentiable if order == 2 or transform else nullcontext

        start = theta or self.start()
        rate = None if order == 2 or transform else self.fixed_rate
        few = nullcontext if rate is None else sparse_embeddings
        # To order 1 an inner gradient is a number; to order 2 what lies before the head learns through it.
        inputs = self.read(support, graph=order == 2)

        def loss_of(weights: Weights) -> Tensor:
            with attention(), guard(), few(self.model):
                outputs = self.outputs(weights, inputs)
            if not (transform or self._looked_at):
                check_outputs(outputs, support.targets, owner)
            loss = self.loss(self.inner_loss, outputs, support.targets)
            if self.implicit is not None:
                away = torch.stack([(weight - start[name].detach()).square().sum() for name, weight in weights.items()])
                loss = loss + self.implicit / 2 * away.sum()
            if not (transform or self._looked_at):
                check_graph(loss, owner)
                self._looked_at = True
            return loss

        gradient = by_transform if transform else by_autograd
        try:
            if rate is None or any(weight.requires_grad for weight in start.values()):
                yield from inner_loop(loss_of, start, self.step_rates, steps=steps, order=order, gradient=gradient)
            else:
                yield from descend(
                    lambda _, phi: by_autograd(loss_of, phi, 1), start, lr=rate, steps=steps, optimizer="sgd"
                )
        except RuntimeError as error:
            raise explained(error, owner) from error

    def maps_tasks(self, batch: MetaBatch) -> bool:
        """Whether the tasks of a batch are computed at once: as asked for, else where that was found to give the same."""
        stacked = batch.stacked
        if stacked is None or self.tasks == "one_by_one":
            return False
        if self._at_once is None:
            with torch.autocast(self.device.type, enabled=False):  # so that rounding hides nothing
                self._at_once = self._same_at_once(batch)
            if self.tasks == "at_once" and not self._at_once:
                raise Refusal(
                    f"{type(self).__name__}.tasks at_once: torch.vmap over this net fails, or gives other losses than the tasks "
                    "one by one; set tasks to one_by_one."
                )
        return self._at_once

    def _same_at_once(self, batch: MetaBatch) -> bool:
        """Tries the first two tasks of a batch both ways, without learning from it; to order 2 the outer gradient too."""
        stacked = batch.stacked
        assert stacked is not None
        two = stacked.apply(lambda t: t[:2])
        theta = {name: weight.requires_grad_() for name, weight in self.start_without_graph().items()}

        def loss(episode: Episode, transform: bool) -> Tensor:
            *_, weights = self.adapted(episode.support, steps=1, order=self.order, theta=theta, transform=transform)
            return self.loss(self.outer_loss, self.outputs(weights, episode.query.inputs), episode.query.targets)

        coarse = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in theta.values())
        rtol = 3e-2 if coarse else 1e-4
        one_by_one = [
            loss(episode, False).detach() for episode in MetaBatch(two, {"task": len(two.query.targets)}).episodes()
        ]
        try:
            at_once = mapped(lambda episode: loss(episode, True), two)
            if self.order == 2:
                torch.autograd.grad(at_once.sum(), list(theta.values()), allow_unused=True)
        except (RuntimeError, ValueError):
            return False  # an operation without a rule for it, or code that asks for values
        return bool(torch.allclose(at_once.detach(), torch.stack(one_by_one), rtol=rtol, atol=1e-6))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As any module's; an operation without a second derivative is first met here, where tasks are computed at once."""
        try:
            super().backward(loss, *args, **kwargs)
        except RuntimeError as error:
            raise explained(error, type(self).__name__) from error

    # -- what is measured -------------------------------------------------------------------------------------------------

    @property
    def measured_steps(self) -> list[int]:
        """Numbers of inner steps after which an episode is measured."""
        return sorted({*(MEASURED if self.eval_steps is None else self.eval_steps), self.steps})

    def _measured(self) -> list[str]:
        names = ["loss", "accuracy"] if self.classifies else ["loss"]
        return [*names, *(f"step_{step}/{name}" for step in self.measured_steps for name in names)]

    @property
    def classifies(self) -> bool:
        """Whether there is a right answer, told by the base's task, the name of the outer loss, or the data's targets."""
        if self.base is not None:
            return self.task != "regression"
        if self.outer_loss != "auto":
            return self.outer_loss == "cross_entropy"
        return bool(getattr(self.datamodule, "has_classes", True))

    def _measure(self, batch: MetaBatch) -> Tensor:
        if self.maps_tasks(batch):
            stacked = batch.stacked
            assert stacked is not None
            return mapped(lambda episode: self._numbers(episode, transform=True), stacked)
        return super()._measure(batch)

    def _measure_one(self, episode: Episode) -> Tensor:
        return self._numbers(self.referred(episode), transform=False)

    def _numbers(self, episode: Episode, *, transform: bool) -> Tensor:
        theta = self.start_without_graph()
        of_step: dict[int, list[Tensor]] = {}
        steps, query = self.measured_steps, self.read(episode.query, graph=False)
        run = self.adapted(episode.support, steps=steps[-1], order=1, theta=theta, transform=transform)
        for step, weights in enumerate(run):
            if step in steps:
                with torch.no_grad():
                    of_step[step] = self.measure(self.outputs(weights, query), episode.query.targets)
        return torch.stack([*of_step[self.steps], *(value for step in steps for value in of_step[step])]).detach()

    def _said(self, episode: Episode) -> Tensor:
        weights = self.adapt(episode.support)
        with torch.no_grad():
            return self.outputs(weights, episode.query.inputs)

    def measure(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """The mean loss of rows, and of classes the share that is right."""
        losses = self.loss(self.outer_loss, outputs, targets)
        return [losses, self.right(outputs, targets).mean().to(losses.dtype)] if self.classifies else [losses]

    # -- use ----------------------------------------------------------------------------------------------------------

    def adapt(self, support: Rows | tuple[Tensor, Tensor], *, steps: int | None = None) -> Weights:
        """The weights that this module takes on for a task, by name; the module itself stays as it is.

        Args:
            support: the rows to adapt on; of a net simply its inputs and their targets, ``(x, y)``.
            steps: of the inner loop; None: as many as in training.

        Returns:
            name -> adapted weight, without a graph; `adapt_` writes them in.
        """
        rows = support if isinstance(support, Rows) else Rows(*support)
        theta = self.start_without_graph()
        with torch.inference_mode(False), torch.enable_grad():
            rows = self._known(rows.apply(torch.clone))
            *_, weights = self.adapted(rows, steps=self.steps if steps is None else steps, order=1, theta=theta)
        return {name: weight.detach() for name, weight in weights.items()}

    @torch.no_grad()
    def adapt_(self, support: Rows | tuple[Tensor, Tensor], *, steps: int | None = None) -> None:
        """Adapts the module itself."""
        parameters = dict(self.named_parameters())
        for name, weight in self.adapt(support, steps=steps).items():
            parameters[name].copy_(weight)

    def keep_classes_(self, count: int) -> None:
        """Leaves the first outputs of a base's head, for a task with fewer classes than the episodes had.

        Args:
            count: how many.

        Raises:
            Refusal: more than there are.
        """
        outputs = self._outputs()
        if count > outputs:
            raise Refusal(
                f"The support rows have {count} classes, and {type(self).__name__} has learned to tell {outputs} apart; learn from "
                f"episodes of at least as many (data.way {count})."
            )
        if count < outputs:
            rates: Any = self.inner_rates if getattr(self, "rates", "fixed") == "per_parameter" else {}
            cut_classes_(self, self.view.output_layer()[1], count, rates)
            self.model.config.num_labels = count
            self.way = count

    def trained(self) -> list[nn.Parameter]:
        """What the outer loop trains."""
        return Attachment.of(self).trained()


def mapped(function: Callable[[Episode], Any], stacked: Episode) -> Any:
    """A function of an episode, over all of a stack at once by `torch.vmap`."""
    tensors: list[Any] = [
        stacked.support.inputs,
        stacked.support.targets,
        stacked.query.inputs,
        stacked.query.targets,
    ]

    def one(*parts: Tensor) -> Any:
        return function(Episode(Rows(parts[0], parts[1]), Rows(parts[2], parts[3])))

    return torch.vmap(one)(*tensors)


__all__ = ["AdaptingModule", "Inner", "Tasks", "mapped"]
