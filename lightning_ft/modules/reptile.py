"""Reptile: move the start towards where ordinary training on each task ends."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from lightning_ft.engine.adapting import AdaptingModule, Tasks
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.batch_part import part_of
from lightning_ft.engine.episode_checks import check_outputs, check_steps
from lightning_ft.engine.episode_tasks import EpisodeTask
from lightning_ft.engine.episodes import Episode, MetaBatch, Rows
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.functional.episode_losses import LossName
from lightning_ft.functional.inner_loop import Order, Weights, by_autograd, by_transform
from lightning_ft.functional.inner_optimizers import InnerOptimizer, descend
from lightning_ft.models.quantize import Mode
from lightning_ft.nn.double_backward import check_graph, explained, no_checkpointing, twice_differentiable
from lightning_ft.nn.sparse_embeddings import sparse_embeddings


class Reptile(AdaptingModule):
    """Learns weights that lie near those which ordinary training reaches on each task.

    ``theta <- theta + lr * mean over tasks of (phi_k - theta)``: phi_k is what k steps on a task's support rows make of theta, and
    no gradient goes through them, so that steps are cheap and may be many. No query rows are used in training. The difference
    theta - phi_k is handed to the outer optimizer as if it were a gradient, so that accumulation, DDP and whatever edits gradients
    work as usual. Leave ``gradient_clip_val`` out: it bounds the length of the way, which is several units after a few steps of
    Adam over a base, where gradients are clipped at 1.

    Args:
        base: the model to start from, for texts, with a new head of as many classes as an episode has. None: see ``net``.
        net: any torch module instead, for tensors and images.
        task: what a base learns, by its objective's name: ``sequence_classification``, the class of a text;
            ``token_classification``, a tag of each word; ``regression``, a number of a text; ``causal_lm`` and ``seq2seq_lm``, the
            tokens of an answer, each counting the same; ``reward``, which of two answers is better, by Bradley-Terry; ``dpo``, the
            same as a policy, against the model as it was when the fit began. All but classes need tasks that a function makes, see
            `EpisodeData`.
        way: classes of an episode; None: as the data have. Of a base that classifies only.
        steps: inner steps k in training; 5 to 10 in the paper.
        inner_lr: rate of the inner steps.
        inner_optimizer: ``sgd``, or ``adam`` without momentum, as in the paper for images.
        inner_batch: support rows of one inner step, taken in turn so that classes mix; None: all. What tasks have in common is
            learned from rows that differ between the steps, see ``EpisodeData.train_shot``.
        inner_loss: loss of a support row (token, pair): ``auto`` (cross_entropy of classes, tags, tokens and judged pairs, mse of
            numbers, sigmoid of dpo), ``cross_entropy``, ``mse``, ``mae``, ``huber``; of dpo ``sigmoid``,
            ``ipo``, ``hinge``, ``simpo`` or another that judges each pair by itself, see `DPO`.
        outer_loss: what validation measures, likewise.
        beta: of dpo, as in `MAML`.
        eval_steps: numbers of inner steps after which validation and test measure each episode; None: 0, 1, 5 and 10. That of
            training always is one.
        tasks: of validation and test: ``at_once``, ``one_by_one`` or ``auto``, as in `MAML`. In training one by one.
        lr: the share of the way that the start moves (with plain SGD); 1 would jump to the mean of the adapted weights.
        weight_decay: of the outer optimizer.
        warmup_steps: optimizer steps over which the rate rises from zero.
        schedule: how the rate falls: linearly to zero, as in the paper.
        optimizer: a factory of another torch optimizer for the outer loop; None is SGD without momentum, as the formula says.
        base_dtype: of frozen weights, as in `MAML`.
        attention: of a base: ``auto``, ``lightning_ft``, ``sdpa`` or ``eager``.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then, see `SFT`.

    Logs:
        ``train/loss`` (of support rows after the last inner step: those that the next would take), ``val/loss``, ``val/accuracy``,
        ``val/step_s/...`` and their ``..._ci95`` as `MAML`.

    Raises:
        Refusal: as `MAML`.

    Example:
        >>> Reptile(net=torch.nn.Linear(1, 1), inner_lr=0.02).lr
        0.1

    References:
        Nichol et al., 2018, algorithm 2. Proven against a loop over copies of the net with torch's own optimizers in tests/modules.
    """

    inner = "all"
    order: Order = 1
    no_likelihood = "takes no gradient of a likelihood: it moves towards where its inner steps end"

    def __init__(
        self,
        base: str | None = None,
        *,
        net: nn.Module | None = None,
        task: EpisodeTask = "sequence_classification",
        way: Annotated[int, Ge(2)] | None = None,
        steps: Annotated[int, Ge(1)] = 5,
        inner_lr: Annotated[float, Gt(0)] = 0.02,
        inner_optimizer: InnerOptimizer = "sgd",
        inner_batch: Annotated[int, Ge(1)] | None = None,
        inner_loss: LossName = "auto",
        outer_loss: LossName = "auto",
        beta: Annotated[float, Gt(0)] | None = None,
        eval_steps: list[int] | None = None,
        tasks: Tasks = "auto",
        lr: Annotated[float, Gt(0)] = 0.1,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] = 0,
        schedule: Schedule = "linear",
        optimizer: OptimizerFactory | None = None,
        base_dtype: DtypePolicy = "float32",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
    ) -> None:
        super().__init__(
            base,
            net=net,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
            task=task,
        )
        self.way = way
        self.steps = steps
        self.inner_lr = inner_lr
        self.inner_optimizer = inner_optimizer
        self.inner_batch = inner_batch
        self.inner_loss = inner_loss
        self.outer_loss = outer_loss
        self.beta = beta
        self.eval_steps = eval_steps
        self.tasks = tasks
        self.check()
        check_steps("Reptile", eval_steps)

    def _optimizer_factory(self) -> OptimizerFactory | None:
        return self.optimizer or torch.optim.SGD

    def adapted(
        self,
        support: Rows,
        *,
        steps: int,
        order: Order,
        theta: Weights | None = None,
        transform: bool = False,
    ) -> Iterator[Weights]:
        """The weights of a task before its first step and after each; no graph goes through them, whatever ``order``."""
        gradient, owner = (by_transform if transform else by_autograd), type(self).__name__

        def slopes(step: int, weights: Weights) -> Weights:
            rows = in_turn(support, step, self.inner_batch)

            def loss_of(fast: Weights) -> Tensor:
                if transform:
                    with twice_differentiable():
                        return self._support_loss(fast, rows)
                with no_checkpointing(owner):
                    if not self._looked_at:
                        check_outputs(self.outputs(fast, rows.inputs), rows.targets, owner)
                    with sparse_embeddings(self.model):
                        loss = self._support_loss(fast, rows)
                if not self._looked_at:
                    check_graph(loss, owner)
                    self._looked_at = True
                return loss

            return gradient(loss_of, weights, 1)

        try:
            yield from descend(
                slopes, theta or self.start(), lr=self.inner_lr, steps=steps, optimizer=self.inner_optimizer
            )
        except RuntimeError as error:
            raise explained(error, owner) from error

    def _support_loss(self, weights: Weights, rows: Rows) -> Tensor:
        return self.loss(self.inner_loss, self.outputs(weights, rows.inputs), rows.targets)

    def training_step(self, batch: MetaBatch, batch_idx: int) -> Tensor:
        """One meta-batch: the mean way back from the adapted weights to the start, as a gradient."""
        total, correct = self.accumulated(batch, self._way_back)
        return self._hand_over("reptile", batch, total, correct if self.classifies else None)

    def _way_back(self, episode: Episode) -> tuple[Tensor, Sequence[Tensor | None], Tensor]:
        episode, theta = self.referred(episode), self.start()
        *_, phi = self.adapted(episode.support, steps=self.steps, order=1)
        with torch.no_grad():
            # Of the rows that the next step would take: all of them, where they are 75, take a fifth of a task more.
            rows = in_turn(episode.support, self.steps, self.inner_batch)
            outputs = self.outputs(phi, rows.inputs)
            loss = self.loss(self.inner_loss, outputs, rows.targets)
            hits = self.right(outputs, rows.targets).mean() if self.classifies else torch.zeros_like(loss)
            ways = {id(weight): weight.detach() - phi[name] for name, weight in theta.items()}
        return loss, [ways.get(id(p)) for p in self.trained()], hits


def in_turn(rows: Rows, step: int, size: int | None) -> Rows:
    """The rows (pairs) of a step: every n-th one, so that those sorted by class mix; all where they are fewer than ``size``.

    Args:
        rows: S rows.
        step: from 0.
        size: about how many.
    """
    batch, per = rows.inputs, 2 if rows.each == "pair" else 1
    count = len(batch.ids) // per if isinstance(batch, Batch) else len(rows.targets)
    if size is None or size >= count:
        return rows
    stride = -(-count // size)
    at = torch.arange(step % stride, count, stride, device=rows.targets.device)
    if not isinstance(batch, Batch):
        return Rows(batch[at], rows.targets[at])
    part = part_of(batch, [per * row + k for row in at.tolist() for k in range(per)])
    return replace(rows, inputs=part, targets=part.labels if rows.each == "token" else rows.targets[at])
