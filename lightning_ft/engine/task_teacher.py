"""A teacher of one task among several: it reads the rows of its task alone, and the student's task imitates what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.batch_part import part_of
from lightning_ft.engine.task_list import OF_PAIRS
from lightning_ft.engine.teacher import Origin, Teacher, load_teacher, vocabulary_of
from lightning_ft.engine.terms import Term
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.observed import Observer
from lightning_ft.models.vocabulary import shared_vocabulary, sliced


class TaskTeacher:
    """One teacher, and the term that it brings.

    Args:
        task: that it teaches.
        weight: of soft targets, beside the task's own weight.
        of_logits: (student's, teacher's, kind) -> (N,) losses; kind is ``one``, ``several`` or ``numbers``.
        of_tokens: (view, (1, T, D) hidden states, batch, teacher's logits of a slice, how many tokens are compared) -> the sum.
        know: is told the teacher's module.
        note: is told in each step what the task is, ``numbers`` or other, for what is logged beside the term.
    """

    def __init__(
        self,
        task: str,
        weight: float,
        of_logits: Callable[[Tensor, Tensor, str], Tensor],
        of_tokens: Callable[..., Tensor],
        know: Callable[[nn.Module], None],
        note: Callable[[str], None],
    ) -> None:
        self.task, self.weight, self.of_logits, self.of_tokens = task, weight, of_logits, of_tokens
        self.know, self.note = know, note
        self.teacher: Teacher | None = None
        self._together = False  # whether all ranks must ask equally often
        self.size: int | None = None
        self._used = 0  # tokens that both know; what an output layer has beyond them is padding

    def check(self, module: Any, origin: Origin | None) -> None:
        """Refuses a task that is not there or imitates nothing, and a teacher of other tokens, before anything is loaded.

        Args:
            module: a `MultiTask`.
            origin: where the teacher is; None: none is needed.
        """
        names = module.task_names
        if self.task not in names:
            raise Refusal(
                f"Distillation in MultiTask teaches the task whose name it has, and {self.task!r} is none of {', '.join(names)}; "
                "set name."
            )
        objective = module.asked()[self.task].objective
        if objective in OF_PAIRS:
            raise Refusal(
                f"The task {self.task!r} is {objective}, which compares answers and imitates none; teach another task."
            )
        if origin is not None:
            self._used = shared_vocabulary(module.tokenizer, origin.tokenizer())

    def load(self, module: Any, attachment: Attachment, origin: Origin | None, **options: Any) -> None:
        """Loads the teacher, once the student is there; evaluations need none."""
        if origin is None or not attachment.installed or not attachment.trainer.training:
            return
        task, device = module.asked()[self.task], attachment.trainer.strategy.root_device
        view, frozen = load_teacher(
            origin,
            task.objective,
            labels=task.labels,
            multi_label=task.several,
            packing=bool(module.admission.packing) and getattr(module.datamodule, "packing", None) is not False,
            device=device,
            **options,
        )
        observer = Observer(view)
        observer.attach()
        self.teacher = Teacher(observer, partial(frozen.on, device))
        if task.objective == "causal_lm":
            self.size = sliced(vocabulary_of(module.view), self.teacher.vocabulary, self._used)
        self.know(frozen.model)
        frozen.spread(attachment.trainer.strategy)
        self._together = frozen.divided

    def term(self, module: Any, batch: Batch, output: Any) -> Term:
        """``TASK/soft_targets``, counted as the task is; of no rows zero, with a gradient of zero."""
        assert self.teacher is not None
        task, weight = next((one, w) for one, w in module.weighed if one.name == self.task)
        name = f"{self.task}/soft_targets"
        reads, outcomes = module.computed
        seen, own = reads[self.task], outcomes[self.task]
        weight = weight * self.weight
        self.note(
            module.asked()[self.task].objective
        )  # whether this rank has rows of it or not, so that all log the same
        mine = batch.columns.get(f"rows/{task.number}")
        if own is None or mine is None:
            if self._together:  # other ranks may have rows, and gather its weights with this one: any row will do
                self.teacher.see(part_of(batch, [0]))
            return Term(name, seen.hidden.sum() * 0.0, batch.counts.get(task.unit, 0.0), task.unit, weight, task.own)
        part = part_of(batch, mine.tolist())
        said = self.teacher.see(part).result
        assert said is not None
        if task.objective == "causal_lm":
            read = seen.batch
            places = read.columns[f"scored/{task.number}"]
            chosen, size = said.reshape(-1, said.shape[-1])[part.scored], self.size
            here = replace(read, scored=read.scored[places], labels=read.labels[places], counts={"token": 1.0})
            teacher = self.teacher
            total = self.of_tokens(
                module.view, seen.hidden[None], here, lambda rows: teacher.logits(chosen[rows])[..., :size], size
            )
        else:
            several = module.asked()[self.task].several
            kind = "numbers" if task.objective == "regression" else "several" if several else "one"
            total = self.of_logits(own.logits, said, kind).sum()
        return Term(name, total, batch.counts[task.unit], task.unit, weight, task.own)


__all__ = ["TaskTeacher"]
