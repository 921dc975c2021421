"""The base of modules that learn from episodes: a base model or any net, and what is measured over episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.engine.answers import no_dropout
from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.end_to_end import end_to_end
from lightning_ft.engine.episode_evaluation import EpisodeMeans
from lightning_ft.engine.episode_tasks import KINDS, EpisodeTask, Features, outputs_of
from lightning_ft.engine.episodes import Episode, MetaBatch
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, FineTuningModule, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.terms import Term
from lightning_ft.engine.without_chance import nothing_dropped, refuse_chance
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.inner_loop import with_gradients
from lightning_ft.models.load_task import Task
from lightning_ft.models.quantize import Mode

NET_LR = 1e-3
"""Rate of a net that is trained from nothing: Adam's own default, and that of Finn et al., 2017, for the sinusoids."""


class EpisodeModule(FineTuningModule):
    """A module whose batches are episodes: subclasses say what a step learns, and what is measured of an episode.

    Attributes:
        learns_from_episodes: tells the rules of `lightning_ft.engine.compatibility`.
        no_likelihood: why a task has none whose gradient a step takes; None where it has one.
    """

    learns_from_episodes = True
    no_likelihood: str | None = None
    way: int | None
    _tried = False

    def __init__(
        self,
        base: str | None,
        *,
        net: nn.Module | None,
        lr: float | None,
        weight_decay: float,
        warmup_steps: int | None,
        schedule: Schedule,
        optimizer: OptimizerFactory | None,
        base_dtype: DtypePolicy,
        attention: Any,
        trust_remote_code: bool,
        revision: str | None,
        quantize: Mode | None,
        task: EpisodeTask = "sequence_classification",
    ) -> None:
        super().__init__(
            base or "",
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            gradient_checkpointing=False,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
        )
        self.task = task  # type: ignore[assignment]
        self.base = base  # type: ignore[assignment]
        self.model = net
        self.evaluation: EpisodeMeans | None = None

    def check(self) -> None:
        """Refuses arguments out of bounds, and both or neither of ``base`` and ``net``."""
        super().check()
        name = type(self).__name__
        if self.base is None and self.model is None:
            raise Refusal(
                f"{name} needs something to learn: give base (a folder or Hugging Face id, for texts) or net (any nn.Module). "
                f"A checkpoint of a net is loaded by lightning_ft.load(path, module={name}(net=...))."
            )
        if self.base is not None and self.model is not None:
            raise Refusal(f"{name} takes base or net, not both; leave one of them out.")
        if self.task != "sequence_classification" and self.base is None:
            raise Refusal(f"{name}.task {self.task} is for a base, which reads texts; leave it out for a net.")
        if self.writes and (self.way is not None or self.head_lr is not None):
            raise Refusal(f"{name}.way and head_lr belong to classes, and the task is {self.task}; leave them out.")
        if not self.counts_classes and self.way is not None:
            raise Refusal(f"{name}.way belongs to classes, and the task is {self.task}; leave it out.")
        if self.quantize is not None and self.base is None:
            raise Refusal(f"{name}.quantize packs a base that is loaded; pack your net before you give it (quantize_).")

    @property
    def loads(self) -> Task:
        """The task that the base is loaded for: of one that judges answers regression, of one that prefers them causal_lm."""
        return KINDS[self.task].loads

    @property
    def asks_for(self) -> str:
        """What the rows of a base's episodes are learned for."""
        return KINDS[self.task].asks

    @property
    def counts_classes(self) -> bool:
        """Whether a base has an output for each class of an episode."""
        return self.asks_for in ("classes", "tags")

    @property
    def net(self) -> nn.Module | None:
        """The net as it was given; None where a base is loaded."""
        found: nn.Module | None = self.model if self.base is None else None
        return found

    def resolved_arguments(self) -> dict[str, Any]:
        """With the number of classes, which was the data's to say."""
        arguments = arguments_of(self)
        if self.base is not None and self.model is not None and "way" in arguments and self.counts_classes:
            arguments["way"] = self.way or getattr(self.datamodule, "way", None) or self._outputs()
        return arguments

    def _outputs(self) -> int:
        return int(self.model.config.num_labels)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; a net has none."""
        return super().tokenizer if self.base is not None else None

    # -- loading ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the base, or takes the net."""
        self._check_rows()
        if self.base is not None:
            super().configure_model()
        else:
            self.model.train()
        # `lightning_ft.load` knows no data, and later ones may have numbers where these have classes.
        if self.evaluation is None or self.evaluation.names != self._measured():
            self.evaluation = EpisodeMeans(self._measured())

    def _check_rows(self) -> None:
        """Refuses rows that are no episodes, and episodes whose texts ask for something else than the task learns."""
        theirs, name = getattr(self.datamodule, "asks_for", None), type(self).__name__
        given = type(self.datamodule)
        if theirs is None and given.__module__.startswith("lightning_ft."):
            raise Refusal(f"{name} learns from episodes, and {given.__name__} gives rows; use EpisodeData.")
        if self.base is not None and theirs is not None and theirs != self.asks_for:
            fitting = " or ".join(task for task, kind in KINDS.items() if kind.asks == theirs)
            kind = KINDS[self.task if KINDS[self.task].asks == self.asks_for else "sequence_classification"]
            raise Refusal(
                f"{name} learns to {kind.learns}, and the episodes have {theirs}; "
                f"{'leave model.task out' if theirs == 'classes' else f'set model.task to {fitting}'}."
            )

    def _classes(self) -> tuple[list[str] | None, bool]:
        """As many as an episode has, without names: each episode deals them anew."""
        if not self.counts_classes:
            return None, False
        way = self.way or getattr(self.datamodule, "way", None)
        theirs = getattr(self.datamodule, "way", None)
        name = type(self).__name__
        if way is None:
            raise Refusal(f"{name}.way, the number of classes of an episode, is not known; give it, or EpisodeData.")
        if theirs is not None and theirs != way:
            raise Refusal(f"{name}.way is {way}, and the episodes have {theirs} classes; set data.way to {way}.")
        return [str(number) for number in range(way)], False

    def register(self, attachment: Attachment) -> None:
        """The base's own edits, and no dropout: two passes over one row must be of one function."""
        if self.base is not None:
            super().register(attachment)
        name = type(self).__name__
        for technique in attachment.techniques:
            if getattr(technique, "dropout", None):
                given = type(technique).__name__
                raise Refusal(
                    f"{given}.dropout is {technique.dropout}, and {name} differentiates through several passes over "  # type: ignore[attr-defined]
                    "one task, which must be of one function; leave it out."
                )
        attachment.edit("hooks", "no dropout", no_dropout)
        attachment.edit("hooks", "episodes", lambda module: self._prepare(), order=1, again=True)

    def _prepare(self) -> None:
        """What is to be found and checked once everything is injected; again in each run, which may inject more."""
        self._tried = False

    def resolved_lr(self) -> float:
        """``lr``; else that of what is trained, or `NET_LR` for a net."""
        if self.lr is not None or self.base is not None:
            return super().resolved_lr()
        suggested = [t.traits.suggested_lr for t in Attachment.of(self).techniques if t.traits.suggested_lr is not None]
        return min(suggested, default=NET_LR)

    # -- rows -----------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor | Batch | Features) -> Tensor:
        """Outputs of rows: what a net gives, or what a base says (`lightning_ft.engine.episode_tasks.outputs_of`)."""
        if isinstance(inputs, (Batch, Features)):
            if self.base is None:
                raise Refusal(
                    f"{type(self).__name__}.net takes tensors, and these episodes are texts; give a base instead."
                )
            return outputs_of(self.task, self.view, self.laid(inputs) if isinstance(inputs, Batch) else inputs)
        if self.base is not None:
            raise Refusal(f"{self.base} reads texts, and these episodes are tensors; give a net instead.")
        with nothing_dropped(self.model):
            outputs: Tensor = self.model(inputs)
        return outputs

    def laid(self, batch: Batch) -> Batch:
        """Rows as a base reads them fastest: end to end where it was proven to take them so, on a CPU.

        On a GPU the few rows of an episode leave it waiting for launches, not for padding, and what attends over packed rows there
        has no second derivative.
        """
        packs = self.admission is not None and self.admission.packing and batch.ids.device.type == "cpu"
        return end_to_end(batch) if packs else batch

    def on_train_batch_start(self, batch: MetaBatch, batch_idx: int) -> None:
        """Tries, once a run, whether anything is drawn at random in a pass."""
        self._try_twice(batch)

    def _try_twice(self, batch: MetaBatch) -> None:
        if not self._tried and batch.counts["task"]:
            refuse_chance(self, batch.episodes()[0].support.inputs)
            self._tried = True

    def accumulated(
        self, batch: MetaBatch, task: Callable[[Episode], tuple[Tensor, Sequence[Tensor | None], Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The tasks' losses, summed, with the sum of their gradients: no more than one task's graph is ever held.

        Args:
            batch: the tasks.
            task: an episode -> (its loss, the gradient of each trained parameter or None, its share of right rows).

        Returns:
            The sum of the losses, whose backward pass hands the gradients out; the sum of the shares.
        """
        parameters = Attachment.of(self).trained()
        total, correct = (torch.zeros((), device=self.device) for _ in range(2))
        sums: list[Tensor | None] = [None] * len(parameters)
        for episode in batch.episodes():
            loss, found, hits = task(episode)
            for at, gradient in enumerate(found):
                before = sums[at]
                if gradient is not None:
                    sums[at] = gradient if before is None else before + gradient
            total, correct = total + loss.detach(), correct + hits.detach()
            del loss, found, hits  # with what is left of their graph, before the next task begins its own
        if not batch.counts["task"]:  # a rank without tasks takes part in the backward pass of the others
            sums = [torch.zeros_like(p) for p in parameters]
        return with_gradients(total, list(parameters), sums), correct

    def differentiated(self, loss: Tensor, hits: Tensor) -> tuple[Tensor, Sequence[Tensor | None], Tensor]:
        """What `accumulated` takes of a task: its loss, the loss's gradient in each trained parameter, its share of right rows."""
        return loss, torch.autograd.grad(loss, Attachment.of(self).trained(), allow_unused=True), hits

    def _hand_over(self, name: str, batch: MetaBatch, total: Tensor, correct: Tensor | None) -> Tensor:
        attachment, count = Attachment.of(self), batch.counts["task"]
        attachment.terms([Term(name, total, count, unit="task")])
        if correct is not None:
            attachment.observe({"accuracy": (correct, count)})
        return total

    # -- what is measured -------------------------------------------------------------------------------------------------

    def _measured(self) -> list[str]:
        """Names of the numbers that are measured of an episode."""
        raise NotImplementedError

    def _measure(self, batch: MetaBatch) -> Tensor:
        """(E, K) numbers of the episodes of a micro-batch."""
        return torch.stack([self._measure_one(episode) for episode in batch.episodes()])

    def _measure_one(self, episode: Episode) -> Tensor:
        """(K,) numbers of an episode, gradients allowed."""
        raise NotImplementedError

    def validation_step(self, batch: MetaBatch, batch_idx: int) -> None:
        """Adds the episodes of a batch to what is measured."""
        self._evaluate(batch)

    def test_step(self, batch: MetaBatch, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate(batch)

    def _evaluate(self, batch: MetaBatch) -> None:
        if not batch.counts["task"]:
            return
        self._try_twice(batch)
        # Lightning validates under inference mode, whose tensors can never take part in a gradient: those of the batch are copied.
        with torch.inference_mode(False), torch.enable_grad():
            found = self._measure(batch.apply(torch.clone))
        assert self.evaluation is not None
        self.evaluation.update(found)

    def predict_step(self, batch: MetaBatch, batch_idx: int) -> dict[str, Tensor]:
        """What is said of each episode's query rows, by what was made of its support rows.

        Returns:
            ``episode`` (N,), the episode of the batch that a query row belongs to (of answers to write and of tags, a scored
            token; of pairs, a pair). Of classes and tags ``probabilities`` (N, C), of answers ``logprob`` (N,), of numbers
            ``value`` (N, ...), of pairs ``reward`` (N, 2) or, of a policy, ``logp`` (N, 2) of the better and the worse answer.
        """
        with torch.inference_mode(False), torch.enable_grad():
            episodes = batch.apply(torch.clone).episodes()
            said = [self._said(episode).detach() for episode in episodes]
        if not said:
            return {"episode": torch.zeros(0, dtype=torch.int64, device=self.device)}
        owner = torch.arange(len(said), device=self.device).repeat_interleave(
            torch.tensor([len(one) for one in said], device=self.device)
        )
        outputs = torch.cat(said)
        if self.asks_for == "pairs":
            return {"episode": owner, "reward" if self.task == "reward" else "logp": outputs}
        if self.asks_for == "answers":
            targets = torch.cat([episode.query.targets for episode in episodes])
            return {"episode": owner, "logprob": outputs.log_softmax(-1).gather(-1, targets[:, None])[:, 0]}
        if episodes[0].query.targets.is_floating_point():
            return {"episode": owner, "value": outputs}
        return {"episode": owner, "probabilities": outputs.softmax(-1)}

    def _said(self, episode: Episode) -> Tensor:
        """(N, ...) outputs for the query rows of an episode."""
        raise NotImplementedError

    def likelihood(self, batch: MetaBatch, ask: Ask) -> Tensor:
        """What continual learning asks of each task, (E,): an example is a task, with all its query rows.

        Its gradient is the one that a step takes of the task, whatever it goes through. See `lightning_ft.engine.likelihood`.
        """
        episodes = batch.episodes()
        with ask.examples():  # a layer's inputs say nothing of it: gradients go through the support rows too
            said = [self._said_with_gradient(episode) for episode in episodes]
        targets = [episode.query.targets for episode in episodes]
        if targets[0].is_floating_point():
            values = torch.stack([one.flatten() for one in said])
            # The mean squared error of a row is minimised, not half of it.
            return ask.of_values(values, torch.stack([one.flatten() for one in targets]), variance=0.5)
        counts = torch.tensor([len(one) for one in targets], device=self.device)
        owner = torch.arange(len(said), device=self.device).repeat_interleave(counts)
        return ask.of_logits(torch.cat(said), torch.cat(targets), owner)

    def _said_with_gradient(self, episode: Episode) -> Tensor:
        """The same with the graph through which a step learns."""
        return self._said(episode)

    def on_validation_epoch_start(self) -> None:
        """Forgets what a validation measured that was interrupted."""
        super().on_validation_epoch_start()
        self._forget_evaluation()

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        super().on_test_epoch_start()
        self._forget_evaluation()

    def _forget_evaluation(self) -> None:
        if self.evaluation is not None:
            self.evaluation.reset()

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets what a validation measured."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Computes and forgets what a test measured."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        assert self.evaluation is not None
        found = self.evaluation.compute()
        self.evaluation.reset()
        for name, (mean, half) in found.items():
            # compute() has summed over ranks already; the logger is told of one number each
            shown = name in ("loss", "accuracy")
            self.log(f"{stage}/{name}", mean, prog_bar=shown, rank_zero_only=False)
            self.log(f"{stage}/{name}_ci95", half, rank_zero_only=False)

    def generate(self, *prompts: Any, **options: Any) -> list[str]:
        """Answers by the model as it is, of a task that writes; refused where classes, numbers or judgements were learned."""
        if self.writes:
            return super().generate(*prompts, **options)
        raise Refusal(f"{type(self).__name__} gives classes or numbers and writes no text; use adapt.")


__all__ = ["NET_LR", "EpisodeModule"]
