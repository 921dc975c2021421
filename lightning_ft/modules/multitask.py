"""Several tasks on one base: one trunk, which reads the rows of all at once, and a head for each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lightning_ft.engine.answers import no_dropout, refuse_dropout
from lightning_ft.engine.arguments import refuse_unread
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.task_list import OF_PAIRS, Objective
from lightning_ft.engine.task_measures import TaskMeasures
from lightning_ft.engine.task_reference import reference_logps
from lightning_ft.engine.task_trunk import TaskTrunk
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.preference import LOSSES, Settings, parts
from lightning_ft.functional.preference import check as check_losses
from lightning_ft.models.quantize import Mode
from lightning_ft.objectives import multitask
from lightning_ft.objectives.multitask import Comparison, Outcome, Task, present
from lightning_ft.objectives.multitask_likelihood import likelihood


@dataclass(frozen=True)
class Read:
    """What the trunk has made of rows.

    Attributes:
        batch: the rows.
        rows: (S, D) a vector for each.
        hidden: (T, D) all hidden states, end to end.
    """

    batch: Batch
    rows: Tensor
    hidden: Tensor


class MultiTask(TaskTrunk):
    """Teaches one model several tasks at once: they share its trunk, and each has a head, a weight and measures of its own.

    Minimises ``sum_k w_k L_k`` with ``L_k`` the mean loss of task k over its rows (or scored tokens) in the accumulation window on
    all ranks, exact for any batch size, accumulation and number of ranks. A batch that holds rows of several tasks goes through
    the trunk once (with `GradientSurgery` or gradnorm, which need a backward pass a task, each task's rows by themselves). Data:
    `MultiTaskData`, which names the tasks and tells what each learns; `TaskSampling` decides how often each comes,
    `LossBalancing` and `GradientSurgery` what happens where they disagree.

    An adapter (`LoRA` and others) that has the name of a task is that task's own: rows of other tasks do not see it. It stands
    beside those with other names, which all tasks share. In mixed batches, and under FSDP2, it has to be `LoRA` on linear layers or
    embeddings, which computes on the task's rows alone; others need homogeneous batches.

    With a task of pairs the base drops no activations in training, since answers are compared. The reference of dpo is one more
    forward pass, without gradients, of those rows alone.

    Args:
        base: the model to start from: ``starter:minilm-l6``, a local folder, or a Hugging Face id; a decoder where a task is
            causal_lm or dpo.
        objectives: task -> ``causal_lm`` (the next token, by the base's own head), ``sequence_classification``,
            ``token_classification``, ``regression``; of pairs of answers ``reward`` (Bradley and Terry's loss, a number by a head,
            as `RewardModel`) or ``dpo`` (the base's own head against the model as the fit began, as `DPO`). Tasks left out, or
            None: asks the data, which cannot tell what pairs teach.
        labels: task -> names of its classes in order; None asks the data.
        several: tasks whose rows may have several classes or none; None asks the data.
        weights: task -> weight of its loss; 1 where none is given.
        weigh: ``rows``: each row counts alike, so that a task weighs ``w_k`` times its share of the window's rows, and the sampler
            decides (plain mixing); ``tasks``: the mean of each task that the window holds weighs ``w_k`` however many rows it has,
            as balancing and surgery suppose.
        pool: what stands for a row: its first token (usual for encoders), its last (for decoders), or the mean of all (what
            sentence encoders such as MiniLM were trained for). ``auto`` is the first for encoders, the last for decoders.
        head_dropout: share of a head's inputs dropped in training; BERT's 0.1.
        dpo_loss: of tasks that are dpo: any loss of `DPO` that is counted in pairs.
        dpo_beta: how strongly they hold the policy to the reference; 0.1 as in the paper.
        baselines: task -> measure of a model that was trained on it alone (see ``only`` of `MultiTaskData`): then
            ``val/relative_improvement`` is logged.
        lr: peak learning rate; None takes what the technique suggests (LoRA 2e-4), or 2e-5 for full training.
        head_lr: peak rate of the heads; None: ``lr``. New heads learn from nothing, so that ten times the rate is common.
        weight_decay: AdamW's decay of trained matrices; 0, since a short fine-tuning gains nothing from shrinking weights.
        warmup_steps: optimizer steps over which the rate rises from zero; None takes 3 % of all steps.
        schedule: how the rate falls after the warm-up: along a cosine to zero, linearly to zero, or not at all.
        optimizer: a factory of another torch optimizer; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32. What is trained is
            float32, unless ``pure_bfloat16`` asks for all of it in bfloat16.
        attention: ``auto`` takes this library's packed attention where the model allows it, else transformers' ``sdpa``.
        gradient_checkpointing: recompute activations in backward: one more forward pass for much less memory.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then: ``nf4``, ``nf4-dq``, ``fp4``, ``int8``.
        compile_blocks: compile each repeated block by this backend of ``torch.compile``; None: not.

    Logs:
        ``train/loss``, ``train/<task>`` and ``val/<task>/<measure>``: loss, and as for `SFT` accuracy, f1, pearson and others;
        ``val/loss``, the mean over tasks; ``val/macro``, the mean over tasks of accuracy (of tokens: f1; of numbers: pearson);
        means are over the tasks that have held-out rows. ``train/TASK`` is not a number in a step that lacks the task.

    Raises:
        Refusal: for arguments out of bounds; when the run begins for data that are not `MultiTaskData`, for tasks that differ from
            theirs, and for adapters of single tasks with mixed batches.

    Example:
        >>> MultiTask("starter:minilm-l6", weights={"stars": 2.0}, weigh="tasks").weigh
        'tasks'

    References:
        Caruana, 1997 (hard sharing); Maninis et al., 2019, equation 4 (relative improvement). Proven against single-task training
        and by counting in tests/modules.
    """

    def __init__(
        self,
        base: str,
        *,
        objectives: dict[str, Objective] | None = None,
        labels: dict[str, list[str]] | None = None,
        several: list[str] | None = None,
        weights: dict[str, float] | None = None,
        weigh: Literal["rows", "tasks"] = "rows",
        pool: Literal["auto", "first", "last", "mean"] = "auto",
        head_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1,
        dpo_loss: str = "sigmoid",
        dpo_beta: Annotated[float, Gt(0)] = 0.1,
        baselines: dict[str, float] | None = None,
        lr: Annotated[float, Gt(0)] | None = None,
        head_lr: Annotated[float, Gt(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] | None = None,
        schedule: Schedule = "cosine",
        optimizer: OptimizerFactory | None = None,
        base_dtype: DtypePolicy = "auto",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
        compile_blocks: str | None = None,
    ) -> None:
        super().__init__(
            base,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
            compile_blocks=compile_blocks,
        )
        self.task = None  # type: ignore[assignment]  # no single one
        self.objectives = objectives
        self.labels = labels  # type: ignore[assignment]
        self.several = several
        self.weights = weights
        self.weigh = weigh
        self.pool = pool
        self.head_dropout = head_dropout
        self.dpo_loss = dpo_loss
        self.dpo_beta = dpo_beta
        self.baselines = baselines
        self.head_lr = head_lr
        self.check()
        for name, value in (weights or {}).items():
            if value < 0:
                raise Refusal(f"MultiTask.weights must be at least 0, got {value} for {name}.")
        self.evaluations = TaskMeasures()
        self._comparison = Comparison(dpo_loss, Settings(dpo_beta))
        check_losses(weighed := parts(dpo_loss), self._comparison.settings)
        if len(weighed) > 1 or LOSSES[dpo_loss].unit != "pair":
            raise Refusal(
                f"MultiTask.dpo_loss must be counted in pairs, and {dpo_loss} is in tokens, too; use DPO for it."
            )
        self._present: dict[str, bool] = {}
        self._totals: dict[str, float] = {}
        self.weighed: list[tuple[Task, float]] = []
        self.computed: tuple[dict[str, Read], dict[str, Outcome | None]] | None = None

    # -- loading ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """The trunk and heads, and measures for each task."""
        super().configure_model()
        for name, task in self._known.items():
            if name not in self.evaluations:
                self.evaluations.add(name, task)

    def register(self, attachment: Attachment) -> None:
        """The trunk's edits, and what pairs need."""
        super().register(attachment)
        if not (hasattr(self.datamodule, "task_objectives") or (self.datamodule is None and self.objectives)):
            return  # setup refuses such data
        learned = {task.objective for task in self.asked().values()}
        if "dpo" not in learned.union((self.objectives or {}).values()):
            refuse_unread(self, ("dpo_loss", "dpo_beta"), "no task is dpo")
        if learned.intersection(OF_PAIRS):
            attachment.edit("freeze", "no dropout", lambda module: no_dropout(self.model))
        if "dpo" in learned:
            refuse_dropout(attachment.techniques, "")
            if self._comparison.refers:
                attachment.want_reference("start")

    def _tasks(self) -> list[Task]:
        trunk = {id(p) for p in self.view.backbone.parameters()}
        tasks = []
        for number, (name, known) in enumerate(self._known.items()):
            own = self.heads[name].parameters() if name in self.heads else self.view.head_parameters()
            adapters = self._adapters.parameters(name)
            tasks.append(Task(number, name, known.objective, (*(p for p in own if id(p) not in trunk), *adapters)))
        return tasks

    # -- steps ----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands one term for each task to the attachment, which divides it by the task's count in the window."""
        tasks, totals = self._tasks(), batch.window
        assert totals is not None, "MultiTaskData counts its windows"
        numbered = self._numbered(batch, tasks)
        found = self._outcomes(batch, numbered)
        self._totals = totals
        self._present = {task.name: totals.get(task.unit, 0.0) > 0 for task in tasks}
        weights = {}
        for task in numbered:
            share = totals.get(f"row:{task.name}", 0.0) / max(totals["row"], 1.0) if self.weigh == "rows" else 1.0
            weights[task.name] = (self.weights or {}).get(task.name, 1.0) * share
        self.weighed = [(task, weights[task.name]) for task in numbered]
        terms = multitask.terms(batch, numbered, found, weights)
        here = {task.name for task in numbered}
        rest = [p for task in tasks if task.name not in here for p in task.own]  # of tasks that this run leaves out
        terms[0] = replace(terms[0], sum=terms[0].sum + multitask.touched(rest, self.device))
        Attachment.of(self).terms(terms)
        return terms[0].sum

    def _numbered(self, batch: Batch, tasks: list[Task]) -> list[Task]:
        """The tasks with the numbers that the data give them, where those are fewer."""
        names = list(getattr(self.datamodule, "task_names", self._known))
        return [Task(names.index(t.name), t.name, t.objective, t.own) for t in tasks if t.name in names]

    def _outcomes(
        self, batch: Batch, tasks: list[Task], *, accuracy: bool = False, compares: bool = True
    ) -> dict[str, Outcome | None]:
        here = present(batch, tasks)
        compared = [task for task in tasks if task.objective == "dpo" and self._comparison.refers]
        told = reference_logps(self, batch, present(batch, compared), self._adapters) if compared and compares else None
        read = self._apart(batch, [t for t in tasks if t.name in here]) if self._reads_apart and len(here) > 1 else {}
        whole = self._read(batch, here) if not read else next(iter(read.values()))
        read = {task.name: read.get(task.name, whole) for task in tasks}

        def score(chosen: Tensor, labels: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
            scored: dict[str, Tensor] = self.view.score(chosen, labels, outputs=outputs)
            return scored

        found: dict[str, Outcome | None] = dict.fromkeys(self._known)
        for task in tasks:
            head = self.heads[task.name] if task.name in self.heads else None  # noqa: SIM401 (a ModuleDict has no get)
            seen, reference = read[task.name], told
            if told is not None and seen.batch is not batch and task.name in here:
                reference = told[here[task.name]]
            found[task.name] = multitask.outcome(
                task,
                seen.batch,
                seen.rows,
                seen.hidden,
                head,
                score,
                accuracy=accuracy,
                comparison=self._comparison,
                reference=reference,
            )
        if all(one is None for one in found.values()) and torch.is_grad_enabled():
            found[tasks[0].name] = Outcome(  # a filler: the trunk takes part in the step, with a gradient of zero
                whole.rows.float().sum()[None] * 0.0 + multitask.touched(tasks[0].own, self.device), None, whole.rows
            )
        self.computed = (read, found) if torch.is_grad_enabled() else None
        return found

    @property
    def _reads_apart(self) -> bool:
        """Whether each task's rows go through the trunk by themselves: where each term has a backward pass of its own.

        Those passes are then as long as the task's rows are, and not each as long as the batch. Recomputed activations would find
        another task's adapter switched on.
        """
        recomputes = self.gradient_checkpointing and self._adapters.are_there
        return torch.is_grad_enabled() and Attachment.of(self).term_gradients is not None and not recomputes

    def _apart(self, batch: Batch, tasks: list[Task]) -> dict[str, Read]:
        parts = [(task, multitask.of_task(batch, task)) for task in tasks]
        return {task.name: self._read(part, present(part, [task])) for task, part in parts}

    def _read(self, batch: Batch, here: Mapping[str, Tensor]) -> Read:
        self._adapters.choose(batch, here)
        return Read(batch, *self._trunk(batch))

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each row or pair, (E,), see `lightning_ft.engine.likelihood`."""
        tasks = self._numbered(batch, self._tasks())
        self._adapters.choose(batch, present(batch, tasks))
        try:
            return likelihood(batch, ask, tasks, dict(self.heads.items()), self.view, lambda: self._trunk(batch))
        finally:
            self._adapters.all_on()

    def on_after_backward(self) -> None:
        """All adapters are on between steps, as checkpoints and exports are to find them; the graph is let go."""
        self.computed = None
        self._adapters.all_on()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What is a task's own does not move in a step without its rows, not by momentum either; counts rows."""
        for name in self._known:
            self.rows_seen[name] = self.rows_seen.get(name, 0.0) + self._totals.get(f"row:{name}", 0.0)
        tasks = self._tasks()
        used = {id(p) for task in tasks if self._present.get(task.name, True) for p in task.own}
        for task in tasks:
            for parameter in task.own:
                if id(parameter) not in used:
                    parameter.grad = None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the measures of its tasks."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation, under ``test/``."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """What the first task that a batch holds says of its rows, ``rows`` (S,) naming them; a filler has none.

        Returns:
            ``task``, ``rows``, and as `SFT` ``probabilities`` (S, C), ``value`` (S,), ``logprob`` (S,), or of words
            ``probabilities`` (N, C) and ``segment`` (N,); of pairs, whose rows are the better answer, then the worse one,
            ``reward`` (S,) or ``logprob`` (S,).
        """
        tasks = self._numbered(batch, self._tasks())
        found = self._outcomes(batch, tasks, compares=False)
        self._adapters.all_on()
        task = next((task for task in tasks if found[task.name] is not None), None)
        if task is None:
            return {"task": batch.task, "rows": batch.rows[:0]}
        seen, mine = found[task.name], batch.columns[f"rows/{task.number}"]
        assert seen is not None
        return {"task": task.name, "rows": batch.rows[mine], **self._said(task, seen, batch, mine)}

    def _said(self, task: Task, seen: Outcome, batch: Batch, mine: Tensor) -> dict[str, Tensor]:
        if task.objective == "causal_lm":
            owner = batch.segment_of_scored[batch.columns[f"scored/{task.number}"]]
            return {"logprob": seen.losses.new_zeros(len(batch.rows)).index_add(0, owner, -seen.losses)[mine]}
        assert seen.logits is not None
        if task.objective in OF_PAIRS:
            return {"reward" if task.objective == "reward" else "logprob": seen.logits.reshape(-1)}
        if task.objective == "regression":
            return {"value": seen.logits[:, 0]}
        if seen.segments is not None:  # of words; the rows of a task are in order
            return {"segment": torch.searchsorted(mine, seen.segments), "probabilities": seen.logits.softmax(-1)}
        return {"probabilities": seen.logits.sigmoid() if self._known[task.name].several else seen.logits.softmax(-1)}

    def _evaluate(self, batch: Batch) -> None:
        for name, seen in self._outcomes(batch, self._numbered(batch, self._tasks()), accuracy=True).items():
            if seen is not None:
                self.evaluations.update(name, seen)
        self._adapters.all_on()

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets the measures of a validation."""
        self._log_evaluations("val")

    def on_test_epoch_end(self) -> None:
        """Computes and forgets the measures of a test."""
        self._log_evaluations("test")

    def _log_evaluations(self, stage: str) -> None:
        measured = self.datamodule.tasks_with(stage) if hasattr(self.datamodule, "tasks_with") else self._known
        used = [name for name in self._known if name in measured]
        for name, value in self.evaluations.finished(self._known, used, self.baselines).items():
            # what is measured has been summed over ranks
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "macro"), rank_zero_only=False)
