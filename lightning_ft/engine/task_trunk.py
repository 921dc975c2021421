"""The trunk that several tasks share, and what stands on it: heads, adapters of single tasks, the base's own language head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.generation import Prompt
from lightning_ft.engine.task_adapters import TaskAdapters
from lightning_ft.engine.task_list import SPEAKING
from lightning_ft.engine.task_module import TaskModule
from lightning_ft.engine.technique import Technique
from lightning_ft.formats.heads import kind_of
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.causal import CausalLM
from lightning_ft.models.load_task import load_for_task
from lightning_ft.models.trunk import Trunk, take_off_head
from lightning_ft.nn.task_head import Pool, TaskHead, pool_rows


class TaskTrunk(TaskModule):
    """A module of several tasks as a model: what reads their rows, and who answers. Subclasses say how it learns.

    They store ``pool``, ``head_dropout`` and ``head_lr``.
    """

    pool: Literal["auto", "first", "last", "mean"]
    head_dropout: float
    head_lr: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads = nn.ModuleDict()
        self._adapters = TaskAdapters()

    # -- loading ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the trunk, once, and makes the heads that are missing."""
        self._known = self.asked()
        seed = Attachment.of(self).seed
        if self.model is None:
            kind = "causal_lm" if self.writes else "token_classification"
            self.model, self._tokenizer, _ = load_for_task(
                kind,
                self.base,
                labels=None if self.writes else ["0", "1"],  # of a head that is taken off again
                dtype_policy=self.base_dtype,
                attention=self.attention,
                trust_remote_code=self.trust_remote_code,
                revision=self.revision,
                seed=seed,
            )
            self.admission = admit_task(self.model, kind, packing=True)
            if not self.writes:
                take_off_head(self.model)
            self.model.train()  # Hugging Face returns eval mode and Lightning leaves it so: no dropout, silently
        elif self.writes and isinstance(self.view, Trunk):
            raise Refusal(
                "The module was loaded without a language head, so no task can be causal_lm or dpo; begin with one that is."
            )
        assert self.admission is not None
        if getattr(self.datamodule, "packing", False) and not self.admission.packing:
            raise Refusal(
                f"{self.base} cannot take packed rows, because {self.admission.packing_reason}; set --data.packing false."
            )
        width = int(self.view.config.hidden_size)
        for name, task in self._known.items():
            if name in self.heads or task.objective in SPEAKING:
                continue
            outputs = 1 if task.objective in ("regression", "reward") else len(task.labels or [])
            if not outputs:
                raise Refusal(f"The task {name!r} has no classes: give labels, or data that name them.")
            dropout = 0.0 if task.objective == "reward" else self.head_dropout
            head = TaskHead(width, outputs, dropout=dropout, name=f"heads.{name}", seed=seed)
            self.heads[name] = head.to(self.device)

    def register(self, attachment: Attachment) -> None:
        """The base's own edits, and a look at whose adapters there are once all are injected."""
        super().register(attachment)
        attachment.edit("hooks", "adapters of tasks", self._find_adapters, again=True)
        callbacks: list[Any] = self._trainer.callbacks if self._trainer is not None else []  # type: ignore[attr-defined]
        if any(isinstance(t, Technique) and self.sits_out(t) and "model" in t.traits.edits for t in callbacks):
            # What is frozen beside an adapter is so without it.
            attachment.edit("freeze", "freeze the base", lambda module: freeze_base(self.model))

    def _find_adapters(self, _: Any) -> None:
        mixed = self._trainer is not None and getattr(self.datamodule, "batches", "") == "mixed"
        sharded = self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        self._adapters.find(self, self._known, mixed=mixed, sharded=sharded)

    def sits_out(self, technique: Technique) -> bool:
        """Whether a run that leaves tasks out by ``only`` has no use for it.

        An adapter of a task that is left out would be one more that is shared, and its teacher has nobody to teach.
        """
        if not hasattr(self.datamodule, "task_objectives") or self.datamodule.only is None:
            return False
        name = technique.instance_name
        return name in self.datamodule.tasks and name not in self.asked()

    def own_rates(self) -> dict[str, float]:
        """The heads' rate."""
        factor = 1.0 if self.head_lr is None else self.head_lr / self.resolved_lr()
        return {f"heads.{name}": factor for name, _ in self.heads.named_parameters()}

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def view(self) -> Any:
        """The base as its parts: a `CausalLM` where a task needs its head, else a `Trunk`."""
        if self._view is None or self._view.model is not self.model:
            has_head = self.model.get_output_embeddings() is not None
            self._view = CausalLM(self.model) if has_head else Trunk(self.model)
        return self._view

    def _trunk(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(S, D) a vector for each row, and (T, D) all hidden states end to end."""
        typed = batch.types is not None and "token_type_ids" in self.view._accepted
        extra = {"token_type_ids": batch.types} if typed else {}
        hidden = self.view.hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask, **extra)
        rows = pool_rows(hidden, bounds=batch.bounds, mask=batch.mask, how=self._pool)
        return rows, hidden.reshape(-1, hidden.shape[-1])

    @property
    def _pool(self) -> Pool:
        if self.pool != "auto":
            return self.pool
        return "first" if kind_of(self.view.config) == "encoder" else "last"

    # -- answering ----------------------------------------------------------------------------------------------------

    @property
    def speakers(self) -> list[str]:
        """Tasks that use the base's own language head."""
        return [name for name, task in self.asked().items() if task.objective in SPEAKING]

    @property
    def writes(self) -> bool:
        """Whether a task uses the base's own language head."""
        return bool(self.speakers)

    def speaker(self, task: str | None, own: Collection[str]) -> str | None:
        """The task whose adapters answer a prompt.

        Args:
            task: as asked for; None: the one that speaks.
            own: tasks that have adapters of their own.

        Raises:
            Refusal: for one that does not speak, or where several could and their answers differ.
        """
        speakers = self.speakers
        if task is not None and task not in speakers:
            raise Refusal(f"task must be one that writes texts ({', '.join(speakers) or 'none does'}), got {task!r}.")
        if task is None and len(speakers) > 1 and set(own) & set(speakers):
            raise Refusal(
                f"{' and '.join(speakers)} write texts, by adapters of their own: say which task is to answer (task {speakers[0]})."
            )
        return task or next(iter(speakers), None)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        task: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """Answers to prompts (strings or chats); of adapters of single tasks those of the task that speaks compute alone.

        Args:
            prompts: strings or chats.
            task: which answers, where several could; None: the one that does.
            max_new_tokens: longest answer.
            temperature: 0 takes the most likely token.
            top_p: of sampling: the smallest set of tokens with this probability.

        Raises:
            Refusal: no task writes text, or it is not said which.
        """
        with self._adapters.chosen(self.speaker(task, self._adapters.names)):
            return super().generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)


__all__ = ["TaskTrunk"]
