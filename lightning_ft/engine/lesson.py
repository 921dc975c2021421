"""A lesson: who teaches one of our modules, who listens to student and teacher, and what each says of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.inner_layers import InnerLayers
from lightning_ft.engine.known_teacher import KnownTeacher
from lightning_ft.engine.projections import add_projections, check_projections
from lightning_ft.engine.teacher import SELF, Origin, Teacher, load_teacher, origin_of, self_teacher, vocabulary_of
from lightning_ft.engine.teacher_targets import TeacherTargets
from lightning_ft.functional.token_scores import TopK
from lightning_ft.models.classifier import CLASSIFIES
from lightning_ft.models.load import load_config
from lightning_ft.models.observed import Observer, Seen, check_maps
from lightning_ft.models.quantize import Mode, check_mode
from lightning_ft.models.vocabulary import shared_vocabulary, sliced


class Lesson:
    """What a student of ours learns from, over the runs of one `Distillation`.

    Attributes:
        teacher: as of `Distillation`.
        inner: what is compared beside predictions.
        known: by which a run that resumes knows its teacher.
        width: of the teacher's hidden states, once it is known.
        origin: where the teacher of this run is; None for the model itself, for targets, and where nobody asks for it.
        by_targets: whether what a teacher predicts is read from disk.
        layers: number of a student's layer -> of the teacher's.
        relation_heads: into how many heads values are split.
        size: how many tokens of two padded vocabularies are compared; None: all.
    """

    def __init__(
        self,
        teacher: str,
        inner: InnerLayers,
        *,
        place: str,
        temperature: float,
        targets: str | None = None,
        width: int | None = None,
        quantize: Mode | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        """Sets it up; nothing is looked for before `find`.

        Args:
            teacher: as of `Distillation`, as all others.
            inner: what is compared beside predictions.
            place: the name of the module's part that holds projections.
            temperature: of the run, which kept targets must have.
            targets: the folder of what a teacher predicts.
            width: of the teacher's hidden states, if that was given.
            quantize: the teacher's.
            dtype: of its weights.
            trust_remote_code: for the teacher's repository.
            revision: of it.
        """
        self.teacher, self.inner, self.known = teacher, inner, KnownTeacher()
        self.given_width, self.width = width, width
        self.by_targets = targets is not None
        self._place, self._temperature, self._targets = place, temperature, targets
        self._packing: dict[str, Any] = {"quantize": quantize, "dtype": dtype}
        self._hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        self.forget()

    def forget(self) -> None:
        """What belongs to one run."""
        self.known.forget()
        self.origin: Origin | None = None
        self.layers: dict[int, int] = {}
        self.relation_heads: int | None = None
        self.size: int | None = None
        self._used = 0
        self._students: Observer | None = None
        self._teacher: Teacher | None = None
        self._kept: TeacherTargets | None = None
        self._said: Seen | None = None
        self._maps_checked = False

    # -- before the first step --------------------------------------------------------------------------------------------

    def find(self, attachment: Attachment) -> Origin | None:
        """Where the teacher is, or nowhere where what it predicts was kept.

        Raises:
            Refusal: it is not there, its weights cannot be packed here, or what was kept is of another.
        """
        if self._targets is not None and attachment.fits:
            self._kept = TeacherTargets(Path(self._targets).expanduser())
            named = None if self.teacher == SELF else self.teacher
            self._kept.check(attachment.module.tokenizer, self._temperature, named, **self._packing, **self._hub)
        if self.teacher == SELF or self.by_targets:
            return None
        if not attachment.fits and (self.width or not self.inner.states):
            return None  # evaluations and `lightning_ft.load` outlive the teacher
        if (mode := self._packing["quantize"]) is not None and attachment.fits:
            check_mode(mode)
        self.origin = origin_of(self.teacher, **self._hub)
        if attachment.fits:
            self.origin.check_head(getattr(attachment.module, "task", None))
        return self.origin

    def join(self, attachment: Attachment, rate: float, ready: Callable[[], None]) -> None:
        """Registers projections where widths differ, the reference of a model that teaches itself, and the ears.

        Args:
            attachment: of one of our modules.
            rate: factor of the projections' learning rate.
            ready: called when student and teacher are there.
        """
        self.find(attachment)
        if attachment.fits and not self.by_targets:
            self._compare(attachment.module)
        if self.inner.states:
            attachment.edit("inject", f"distillation:{self._place}", lambda m: self._project(m, attachment, rate))
        if self.teacher == SELF and not self.by_targets:
            attachment.want_reference()

        def prepare(module: Any) -> None:
            if attachment.installed and attachment.fits:  # `lightning_ft.load` and evaluations need no teacher
                self._prepare(module, attachment)
                ready()

        attachment.edit("hooks", f"distillation:{self._place}", prepare, order=50, again=True)

    def _compare(self, module: Any) -> None:
        """Refuses what tokenizers and configurations alone show to be incomparable."""
        own = load_config(module.base, trust_remote_code=module.trust_remote_code, revision=module.revision)
        self.inner.check_layers(own, self.origin.config() if self.origin is not None else own)
        if self.origin is not None:
            self._used = shared_vocabulary(module.tokenizer, self.origin.tokenizer())

    def _project(self, module: Any, attachment: Attachment, rate: float) -> None:
        """Adds a matrix for each mapped layer where the widths differ: parameters of the module, trained and saved with it."""
        own = int(module.view.config.hidden_size)
        self.width = self.given_width or (self.origin.width() if self.origin is not None else self.width or own)
        add_projections(module, attachment, self._place, self.inner.projected(module.view), own, self.width, rate)

    def _prepare(self, module: Any, attachment: Attachment) -> None:
        """Finds or loads the teacher, and begins to listen to the student."""
        itself = self.origin is None and not self.by_targets
        self._students = self.inner.listen_to_student(module, itself)
        attachment.on_leave(self._students.detach)
        if self._kept is not None:
            self.size = self._kept.size(vocabulary_of(module.view))
            self.known.meet(self._kept.about.teacher)
        elif self.origin is None:
            self._teacher = self_teacher(self._students, attachment)
            self.layers, self.relation_heads = self.inner.pair(module.view, module.view)
            self.known.meet(None)
        else:
            self._load(module, self.origin, attachment.trainer.strategy)

    def _load(self, module: Any, origin: Origin, strategy: Strategy) -> None:
        labels, device = module.view.labels if module.task in CLASSIFIES else None, strategy.root_device
        view, frozen = load_teacher(
            origin,
            module.task,
            labels=labels,
            multi_label=getattr(module.model.config, "problem_type", None) == "multi_label_classification",
            packing=bool(module.admission.packing) and getattr(module.datamodule, "packing", None) is not False,
            attention="eager" if self.inner.attention else "auto",
            device=device,
            **self._packing,
        )
        self.layers, self.relation_heads = self.inner.pair(module.view, view)
        observer = self.inner.listen(view, self.layers.values())
        if self.inner.states:
            self.width = observer.width
            check_projections(module, self._place, self.layers, int(module.view.config.hidden_size), self.width)
        self._teacher = Teacher(observer, partial(frozen.on, device))
        if module.task not in CLASSIFIES:
            self.size = sliced(vocabulary_of(module.view), self._teacher.vocabulary, self._used)
        self.known.meet(frozen.model)
        frozen.spread(strategy)

    # -- in a step --------------------------------------------------------------------------------------------------------

    def listen(self, batch: Batch) -> None:
        """The teacher speaks of a batch, before the student does."""
        self._said = self._teacher.see(batch) if self._teacher is not None else None

    def at_scored(self, batch: Batch) -> Callable[[slice], Tensor | TopK]:
        """Gives the teacher's logits of a slice of the batch's scored tokens, or what was kept of them."""
        if self._kept is not None:
            return self._kept.of(batch, batch.labels.device).block
        assert self._teacher is not None and self._said is not None
        return self._teacher.at_scored(self._said, batch, self.size)

    def heard(self) -> tuple[Seen, Seen]:
        """What the student's step was seen to compute, and the teacher; of kept targets nothing was seen.

        Raises:
            Refusal: attention maps that are none.
        """
        assert self._students is not None
        student, teacher = self._students.take(), self._said or Seen()
        self._said = None
        if self.inner.attention and not self._maps_checked:
            blocks = [(own, other) for own, other in self.layers.items() if own > 0 and other > 0]
            check_maps(student, [own for own, _ in blocks], "The student")
            check_maps(teacher, [other for _, other in blocks], "The teacher")
            self._maps_checked = True
        return student, teacher


__all__ = ["Lesson"]
