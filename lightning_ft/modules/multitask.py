"""Several tasks on one base: one trunk, which reads the rows of all at once, and a head for each."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.evaluation import (
    ClassEvaluation,
    Evaluation,
    LanguageEvaluation,
    MultilabelEvaluation,
    ValueEvaluation,
)
from lightning_ft.engine.module import DtypePolicy, FineTuningModule, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.relative_improvement import relative_improvement
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.causal import CausalLM
from lightning_ft.models.load_task import load_for_task
from lightning_ft.models.quantize import Mode
from lightning_ft.models.trunk import Trunk, take_off_head
from lightning_ft.nn.registry import injected_layers
from lightning_ft.nn.task_head import Pool, TaskHead, pool_rows
from lightning_ft.objectives import multitask
from lightning_ft.objectives.multitask import Objective, Outcome, Task

MAIN = {
    "causal_lm": "accuracy",
    "sequence_classification": "accuracy",
    "token_classification": "f1",
    "regression": "pearson",
}
"""The measure that speaks for a task in means over tasks; larger is better for each."""


class MultiTask(FineTuningModule):
    """Teaches one model several tasks at once: they share its trunk, and each has a head, a weight and measures of its own.

    Minimises ``sum_k w_k L_k`` with ``L_k`` the mean loss of task k over its rows (or scored tokens) in the accumulation window on
    all ranks, exact for any batch size, accumulation and number of ranks. A batch that holds rows of several tasks goes through
    the trunk once. Data: `MultiTaskData`, which names the tasks and tells what each learns; `TaskSampling` decides how often each
    comes, `LossBalancing` and `GradientSurgery` what happens where they disagree.

    An adapter (`LoRA` and others) that has the name of a task is that task's own: rows of other tasks do not see it. It stands
    beside those with other names, which all tasks share, and needs homogeneous batches.

    Args:
        base: the model to start from: ``starter:minilm-l6``, a local folder, or a Hugging Face id; a decoder where a task is
            causal_lm.
        objectives: task -> ``causal_lm`` (the next token, by the base's own head), ``sequence_classification``,
            ``token_classification`` or ``regression``; None asks the data.
        labels: task -> names of its classes in order; None asks the data.
        several: tasks whose rows may have several classes or none; None asks the data.
        weights: task -> weight of its loss; 1 where none is given.
        weigh: ``rows``: each row counts alike, so that a task weighs ``w_k`` times its share of the window's rows, and the sampler
            decides (plain mixing); ``tasks``: the mean of each task that the window holds weighs ``w_k`` however many rows it has,
            as balancing and surgery suppose.
        pool: what stands for a row: its first token (usual for encoders), its last (for decoders), or the mean of all (what
            sentence encoders such as MiniLM were trained for). ``auto`` is the first for encoders, the last for decoders.
        head_dropout: share of a head's inputs dropped in training; BERT's 0.1.
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
        ``val/loss``, the mean over tasks; ``val/macro``, the mean over tasks of accuracy (of tokens: f1; of numbers: pearson).

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
        self.baselines = baselines
        self.head_lr = head_lr
        self.check()
        for name, value in (weights or {}).items():
            if value < 0:
                raise Refusal(f"MultiTask.weights must be at least 0, got {value} for {name}.")
        self.heads = nn.ModuleDict()
        self.evaluations = nn.ModuleDict()
        self._known: dict[str, tuple[Objective, list[str] | None, bool]] = {}
        self._adapted: dict[str, list[Any]] = {}
        self._present: dict[str, bool] = {}

    def resolved_arguments(self) -> dict[str, Any]:
        """With the tasks that were taken from the data, which need not be there when a checkpoint is loaded."""
        arguments = arguments_of(self)
        if self._known:
            arguments["objectives"] = {name: known[0] for name, known in self._known.items()}
            arguments["labels"] = {name: known[1] for name, known in self._known.items() if known[1] is not None}
            arguments["several"] = [name for name, known in self._known.items() if known[2]]
        return arguments

    # -- tasks ------------------------------------------------------------------------------------------------------

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in their order; of a run the data's."""
        return list(self._asked())

    @property
    def squared_tasks(self) -> list[str]:
        """Tasks whose loss is a squared error."""
        return [name for name, known in self._asked().items() if known[0] == "regression"]

    def add_task(
        self, name: str, objective: Objective, labels: list[str] | None = None, *, several: bool = False
    ) -> None:
        """Adds a task to a module, one that `lightning_ft.load` gave, say; its head is made when the next run begins.

        Args:
            name: of the task, as the data will call it.
            objective: what it learns.
            labels: names of its classes.
            several: whether a row may have several.
        """
        if name in self._asked():
            raise Refusal(f"The module has a task {name!r} already; give the new one another name.")
        self._known = {**self._asked(), name: (objective, labels, several)}

    def _asked(self) -> dict[str, tuple[Objective, list[str] | None, bool]]:
        """Task -> (objective, labels, whether several hold): those known, given, or told by the data."""
        if self._known:
            return self._known
        data = self.datamodule
        told = hasattr(data, "task_objectives")
        objectives = self.objectives or (data.task_objectives() if told else None)
        if objectives is None:
            raise Refusal("MultiTask needs MultiTaskData, which names the tasks; or name them (model.objectives).")
        given: Any = self.labels
        labels = {**(data.task_labels() if told else {}), **(given or {})}
        several = self.several if self.several is not None else (data.several_labels() if told else [])
        return {name: (what, labels.get(name), name in several) for name, what in objectives.items()}

    def setup(self, stage: str) -> None:
        """Compares the tasks with the data's, before any weight is loaded."""
        data = self.datamodule
        if not hasattr(data, "task_objectives"):
            raise Refusal(
                f"MultiTask reads batches of MultiTaskData, got {type(data).__name__ if data is not None else 'none'}."
            )
        theirs, told = data.task_objectives(), data.task_labels()
        for name, (objective, labels, _) in self._asked().items():
            if name in theirs and (theirs[name] != objective or (labels is not None and told.get(name) != labels)):
                raise Refusal(
                    f"The task {name!r} is {objective} {labels or ''} for the module and {theirs[name]} {told.get(name) or ''} in "
                    f"the data; give both the same."
                )
        missing = [name for name in theirs if name not in self._asked()]
        if missing or (list(theirs) != list(self._asked()) and data.only is None and stage == "fit"):
            raise Refusal(
                f"The data's tasks are {', '.join(theirs)}, the module's {', '.join(self._asked())}; they must be the same, in one "
                f"order (add_task adds one to a module that was loaded)."
            )

    # -- loading ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the trunk, once, and makes the heads that are missing."""
        self._known = self._asked()
        seed = Attachment.of(self).seed
        if self.model is None:
            kind = "causal_lm" if self._speaks else "token_classification"
            self.model, self._tokenizer, _ = load_for_task(
                kind,
                self.base,
                labels=None if self._speaks else ["0", "1"],  # of a head that is taken off again
                dtype_policy=self.base_dtype,
                attention=self.attention,
                trust_remote_code=self.trust_remote_code,
                revision=self.revision,
                seed=seed,
            )
            self.admission = admit_task(self.model, kind, packing=True)
            if not self._speaks:
                take_off_head(self.model)
            self.model.train()  # Hugging Face returns eval mode and Lightning leaves it so: no dropout, silently
        elif self._speaks and isinstance(self.view, Trunk):
            raise Refusal(
                "The module was loaded without a language head, so no task can be causal_lm; begin with one that is."
            )
        assert self.admission is not None
        if getattr(self.datamodule, "packing", False) and not self.admission.packing:
            raise Refusal(
                f"{self.base} cannot take packed rows, because {self.admission.packing_reason}; set --data.packing false."
            )
        width = int(self.view.config.hidden_size)
        for name, (objective, labels, several) in self._known.items():
            if name in self.evaluations:
                continue
            self.evaluations[name] = _evaluation(objective, labels, several)
            if objective != "causal_lm":
                outputs = 1 if objective == "regression" else len(labels or [])
                if not outputs:
                    raise Refusal(f"The task {name!r} has no classes: give labels, or data that name them.")
                head = TaskHead(width, outputs, dropout=self.head_dropout, name=f"heads.{name}", seed=seed)
                self.heads[name] = head.to(self.device)

    def register(self, attachment: Attachment) -> None:
        """The base's own edits, and a look at whose adapters there are once all are injected."""
        super().register(attachment)
        attachment.edit("hooks", "adapters of tasks", lambda module: self._find_adapters(), again=True)

    def _find_adapters(self) -> None:
        found: dict[str, list[Any]] = {name: [] for name in self._known}
        for layer in injected_layers(self).values():
            if layer.adapter_name in found:
                found[layer.adapter_name].append(layer)
        self._adapted = {name: layers for name, layers in found.items() if layers}
        if self._adapted and self._trainer is not None and getattr(self.datamodule, "batches", "") == "mixed":
            raise Refusal(
                f"The adapter {next(iter(self._adapted))!r} is one task's own, and mixed batches hold rows of several; set "
                "--data.batches homogeneous, or give the adapter another name, so that all tasks share it."
            )

    @property
    def _speaks(self) -> bool:
        return any(known[0] == "causal_lm" for known in self._known.values())

    @property
    def view(self) -> Any:
        """The base as its parts: a `CausalLM` where a task needs its head, else a `Trunk`."""
        if self._view is None or self._view.model is not self.model:
            has_head = self.model.get_output_embeddings() is not None
            self._view = CausalLM(self.model) if has_head else Trunk(self.model)
        return self._view

    def own_rates(self) -> dict[str, float]:
        """The heads' rate."""
        factor = 1.0 if self.head_lr is None else self.head_lr / self.resolved_lr()
        return {f"heads.{name}": factor for name, _ in self.heads.named_parameters()}

    def _tasks(self) -> list[Task]:
        trunk = {id(p) for p in self.view.backbone.parameters()}
        tasks = []
        for number, (name, (objective, _, _)) in enumerate(self._known.items()):
            own = self.heads[name].parameters() if name in self.heads else self.view.head_parameters()
            adapters = [p for layer in self._adapted.get(name, []) for p in layer.injected_parameters().values()]
            tasks.append(Task(number, name, objective, (*(p for p in own if id(p) not in trunk), *adapters)))
        return tasks

    # -- steps ----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands one term for each task to the attachment, which divides it by the task's count in the window."""
        tasks, totals = self._tasks(), batch.window
        assert totals is not None, "MultiTaskData counts its windows"
        numbered = self._numbered(batch, tasks)
        found = self._outcomes(batch, numbered)
        self._present = {task.name: totals.get(task.unit, 0.0) > 0 for task in tasks}
        weights = {}
        for task in tasks:
            share = totals.get(f"row:{task.name}", 0.0) / max(totals["row"], 1.0) if self.weigh == "rows" else 1.0
            weights[task.name] = (self.weights or {}).get(task.name, 1.0) * share
        terms = multitask.terms(batch, tasks, found, weights)
        Attachment.of(self).terms(terms)
        return terms[0].sum

    def _numbered(self, batch: Batch, tasks: list[Task]) -> list[Task]:
        """The tasks with the numbers that the data give them, where those are fewer."""
        names = list(getattr(self.datamodule, "task_names", self._known))
        if names == list(self._known):
            return tasks
        return [Task(names.index(t.name), t.name, t.objective, t.own) for t in tasks if t.name in names]

    def _outcomes(self, batch: Batch, tasks: list[Task], *, accuracy: bool = False) -> dict[str, Outcome | None]:
        self._choose_adapters(batch, tasks)
        extra = (
            {"token_type_ids": batch.types}
            if batch.types is not None and "token_type_ids" in self.view._accepted
            else {}
        )
        hidden = self.view.hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask, **extra)
        rows = pool_rows(hidden, bounds=batch.bounds, mask=batch.mask, how=self._pool)  # (S, D)
        flat = hidden.reshape(-1, hidden.shape[-1])  # (T, D)

        def score(chosen: Tensor, labels: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
            scored: dict[str, Tensor] = self.view.score(chosen, labels, outputs=outputs)
            return scored

        found: dict[str, Outcome | None] = dict.fromkeys(self._known)
        for task in tasks:
            head = self.heads[task.name] if task.name in self.heads else None  # noqa: SIM401 (a ModuleDict has no get)
            found[task.name] = multitask.outcome(task, batch, rows, flat, head, score, accuracy=accuracy)
        if all(one is None for one in found.values()) and torch.is_grad_enabled():
            first = next(iter(self._known))  # a filler: the trunk takes part in the step, with a gradient of zero
            found[first] = Outcome(
                rows.float().sum()[None] * 0.0 + multitask.touched(tasks[0].own, rows.device), None, rows
            )
        return found

    @property
    def _pool(self) -> Pool:
        if self.pool != "auto":
            return self.pool
        return "last" if isinstance(self.view, CausalLM) or getattr(self.view.config, "is_decoder", False) else "first"

    def _choose_adapters(self, batch: Batch, tasks: list[Task]) -> None:
        """Lets the rows' own task's adapter compute, and no other's."""
        if not self._adapted:
            return
        here = [task.name for task in tasks if f"rows/{task.number}" in batch.columns]
        if len(here) > 1:
            raise Refusal(
                f"A batch holds rows of {', '.join(here)}, and adapters of single tasks need one task a batch."
            )
        for name, layers in self._adapted.items():
            for layer in layers:
                layer.enabled = name in here

    def on_after_backward(self) -> None:
        """All adapters are on between steps, as checkpoints and exports are to find them."""
        self._all_adapters()

    def _all_adapters(self) -> None:
        for layers in self._adapted.values():
            for layer in layers:
                layer.enabled = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What is a task's own does not move in a step without its rows, not by momentum either."""
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
        """What the model says of each row: ``task``, ``rows`` (S,), and ``logits`` (N, C) or ``logprob`` (N,) of tokens."""
        found = self._outcomes(batch, self._numbered(batch, self._tasks()))
        self._all_adapters()
        name, seen = next((name, one) for name, one in found.items() if one is not None)
        what = {"logits": seen.logits} if seen.logits is not None else {"logprob": -seen.losses}
        return {"task": name, "rows": batch.rows, **what}

    def _evaluate(self, batch: Batch) -> None:
        for name, seen in self._outcomes(batch, self._numbered(batch, self._tasks()), accuracy=True).items():
            evaluation = self.evaluations[name]
            if seen is None:
                continue
            if isinstance(evaluation, LanguageEvaluation):
                assert seen.correct is not None
                evaluation.update({"logprob": -seen.losses, "correct": seen.correct})
            elif isinstance(evaluation, ClassEvaluation):
                assert seen.logits is not None
                evaluation.update(seen.losses, seen.logits, seen.targets, seen.segments)
            else:
                assert seen.logits is not None and isinstance(evaluation, (MultilabelEvaluation, ValueEvaluation))
                logits = seen.logits[:, 0] if isinstance(evaluation, ValueEvaluation) else seen.logits
                evaluation.update(seen.losses, logits, seen.targets)
        self._all_adapters()

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets the measures of a validation."""
        self._log_evaluations("val")

    def on_test_epoch_end(self) -> None:
        """Computes and forgets the measures of a test."""
        self._log_evaluations("test")

    def _log_evaluations(self, stage: str) -> None:
        used = [n for n in self._known if n in getattr(self.datamodule, "task_names", self._known)]
        main: dict[str, float] = {}
        losses = []
        for name in used:
            values = self.evaluations[name].compute()  # type: ignore[operator]
            for measure, value in values.items():
                self.log(f"{stage}/{name}/{measure}", value, rank_zero_only=False)  # compute() has summed over ranks
            losses.append(values["loss"])
            if (value := values.get(MAIN[self._known[name][0]])) is not None:
                main[name] = float(value)
        self.log(f"{stage}/loss", torch.stack(losses).nanmean(), prog_bar=True, rank_zero_only=False)
        if len(main) == len(used):
            self.log(f"{stage}/macro", sum(main.values()) / len(main), prog_bar=True, rank_zero_only=False)
        if self.baselines and set(main) <= set(self.baselines):
            self.log(f"{stage}/relative_improvement", relative_improvement(main, self.baselines), rank_zero_only=False)


def _evaluation(objective: Objective, labels: list[str] | None, several: bool) -> Evaluation:
    if objective == "causal_lm":
        return LanguageEvaluation()
    if objective == "regression":
        return ValueEvaluation()
    return MultilabelEvaluation(len(labels or [])) if several else ClassEvaluation(labels or [])
