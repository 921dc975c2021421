"""Distillation: a student learns what a teacher makes of the same rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from lightning_ft.engine import own_student
from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.inner_layers import InnerLayers
from lightning_ft.engine.lesson import Lesson
from lightning_ft.engine.module import DtypePolicy
from lightning_ft.engine.student import check_student
from lightning_ft.engine.task_teacher import TaskTeacher
from lightning_ft.engine.teacher import SELF
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.distillation import Divergence, LayerMap
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.classifier import CLASSIFIES
from lightning_ft.models.quantize import Mode
from lightning_ft.nn.head_sums import Summed
from lightning_ft.objectives import distillation as objective

_INNER = ("hidden", "cosine", "attention", "values")


class Distillation(Technique):
    """Lets the model that you train imitate a teacher: what it predicts, and if you like what it computes on the way.

    ``task L + soft_targets T^2 KL(q || p) + hidden |h_s W - h_t|^2 / D + cosine (1 - cos) + attention KL + values KL`` is what it
    minimises: L the module's own loss, p and q softmax of the student's and the teacher's logits over the temperature T. Each
    term is a mean over scored tokens (language models, words) or rows, exact for any batch size, accumulation, packing and
    number of ranks; in a module of your own the mean of each micro-batch, as the loss that stands beside it.
    With `MultiTask` one that has the name of a task teaches that task, by soft targets: one callback a teacher. With `SFT` of any
    task, and with a LightningModule of your own, whose outputs are caught in its own step.

    Args:
        teacher: a folder, ``starter:NAME`` or hub id; a checkpoint of this library; a LoRA adapter's folder; or ``self``: the model
            as it is when the fit begins, which costs no memory where LoRA is fresh.
        teacher_module: for a module of your own: a function or class that builds the teacher with its weights in it; it is called
            with what the student's part was called with. None: ``teacher``.
        recipe: which weights hold where none are given: ``soft_targets`` (1 beside the task's loss), ``distilbert`` (5, beside 2 of
            the task and 1 of the last hidden state's cosine; T 2), or ``minilm`` (the last layer's maps and value relations alone).
        task: weight of the module's own loss; 0 learns from the teacher alone. None: the recipe's.
        soft_targets: weight of what the teacher predicts: distributions, or numbers by squared difference. None: the recipe's.
        hidden: weight of the squared difference of hidden states. None: the recipe's.
        cosine: weight of one minus their cosine. None: the recipe's.
        attention: weight of the divergence of attention maps; needs eager attention and padded rows. None: the recipe's.
        values: weight of the divergence of how values relate (MiniLM); needs padded rows. None: the recipe's.
        divergence: of soft targets: ``forward_kl`` covers all that the teacher holds possible, ``reverse_kl`` keeps to what it
            holds likely, ``jensen_shannon`` lies between. ``skewed_kl`` and ``skewed_reverse_kl`` (DistiLLM)
            and ``total_variation`` are bounded before the factor of the temperature, however far apart the two are.
        beta: of ``jensen_shannon``: towards 0 it becomes the forward KL, towards 1 the reverse; of the skewed ones how much of a
            distribution is mixed into the other, 0.1 in their paper.
        temperature: T, above 1 shows more of what the teacher holds unlikely. None: the recipe's.
        scale_t2: whether soft targets are multiplied by T^2, so that T does not change their weight (Hinton et al., 2015);
            ``total_variation`` by T, as its gradient asks.
        layers: which layers are compared: the ``last``; ``uniform``, each of the student's with the teacher's at the same height;
            or pairs {student: teacher}, blocks counted from 1, 0 being the embeddings.
        relation_heads: into how many heads values are split; None: as many as both models have.
        projection_rate: factor of the learning rate of the matrices W that hidden states of another width get.
        teacher_width: of its hidden states; None asks the teacher. A checkpoint remembers it, so that it loads without the teacher.
        targets: a folder that `lightning-ft cache-teacher` wrote; no teacher is loaded then, and ``teacher``, ``dtype`` and
            ``quantize``, where they are given, must be what was kept. None: the teacher is loaded.
        student: in a module of your own, the part whose outputs are compared, classes last; None: its only child.
        outputs: in a module of your own, what the part's columns are: logits of ``one`` class of all (softmax), of ``several`` that
            hold or not by themselves (sigmoid, the mean over them), or ``numbers`` (squared differences, summed). None: numbers
            where there is one column, else one class.
        mask: in a module of your own, the batch's entry that is True at the outputs to compare; None: the attention_mask that the
            part was called with, if it was, else all.
        quantize: pack the teacher's linear layers into 4 or 8 bits, see `SFT`. None: not.
        dtype: of the teacher's weights, as ``base_dtype`` of `SFT`; with ``auto`` what ``teacher_module`` builds keeps its own, and
            with ``self`` there are no others than the model's.
        chunk_size: tokens whose logits exist at one time.
        trust_remote_code: run Python code that the teacher's repository brings; only for authors you trust.
        revision: branch, tag or commit of the teacher's Hugging Face id; None is its main branch.
        name: tells two of them apart; in `MultiTask` the task that is taught.

    The teacher is in eval mode, without gradients, outside the module: no checkpoint, optimizer or DDP bucket holds it. Under FSDP2
    each rank keeps its rows of the teacher's blocks. Labels and vocabularies are compared by name before anything is trained.

    Logs:
        ``train/NAME/soft_targets``, ``hidden``, ``cosine``, ``attention``, ``values``, before their weights, NAME being ``name``;
        and ``train/NAME/t2``, the factor that is in the first: T^2, T for the total variation, 1 for numbers, which T does not
        divide.

    Cost: a forward pass of the teacher. Of language models both losses are made of one pass over the output layers, a chunk of
    logits at a time; with `LossBalancing` or `GradientSurgery` soft targets have a pass over the student's of their own.

    Raises:
        Refusal: before training, where student and teacher cannot be compared, with the reason.

    Example:
        >>> Distillation("starter:smollm2-135m", temperature=2.0)
        Distillation(teacher='starter:smollm2-135m', temperature=2.0)

    References:
        Hinton et al., 2015; Sanh et al., 2019 (DistilBERT); Wang et al., 2020 (MiniLM); Agarwal et al., 2024 (generalised JSD).
        Proven against the formulas in float64 in tests/functional and tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="distillation",
        edits=frozenset({"loss"}),
        needs=frozenset({"reference", "imitation"}),
        cannot=(
            Cannot(
                "episodes",
                "it compares what two models say of rows, and of an episode nothing is said before one has adapted to it",
                "distil first, by SFT, and learn from episodes then",
            ),
        ),
        keeps="projections, where hidden states have different widths; export leaves them out",
    )

    def __init__(
        self,
        teacher: str = SELF,
        *,
        teacher_module: Callable[[], nn.Module] | None = None,
        recipe: Literal["soft_targets", "distilbert", "minilm"] = "soft_targets",
        task: Annotated[float, Ge(0)] | None = None,
        soft_targets: Annotated[float, Ge(0)] | None = None,
        hidden: Annotated[float, Ge(0)] | None = None,
        cosine: Annotated[float, Ge(0)] | None = None,
        attention: Annotated[float, Ge(0)] | None = None,
        values: Annotated[float, Ge(0)] | None = None,
        divergence: Divergence = "forward_kl",
        beta: Annotated[float, Ge(0), Le(1)] = 0.5,
        temperature: Annotated[float, Gt(0)] | None = None,
        scale_t2: bool = True,
        layers: LayerMap | dict[int, int] = "last",
        relation_heads: Annotated[int, Ge(1)] | None = None,
        projection_rate: Annotated[float, Gt(0)] = 1.0,
        teacher_width: Annotated[int, Ge(1)] | None = None,
        targets: str | None = None,
        student: str | None = None,
        outputs: own_student.Outputs | None = None,
        mask: str | None = None,
        quantize: Mode | None = None,
        dtype: DtypePolicy = "auto",
        chunk_size: Annotated[int, Ge(1)] = 256,
        trust_remote_code: bool = False,
        revision: str | None = None,
        name: str = "distillation",
    ) -> None:
        self.teacher = teacher
        self.teacher_module = teacher_module
        self.recipe = recipe
        self.task = task
        self.soft_targets = soft_targets
        self.hidden = hidden
        self.cosine = cosine
        self.attention = attention
        self.values = values
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.scale_t2 = scale_t2
        self.layers = layers
        self.relation_heads = relation_heads
        self.projection_rate = projection_rate
        self.teacher_width = teacher_width
        self.targets = targets
        self.student = student
        self.outputs = outputs
        self.mask = mask
        self.quantize = quantize
        self.dtype = dtype
        self.chunk_size = chunk_size
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.name = name
        self._place = f"{name}_projections"
        self.check()
        if teacher_module is not None and not callable(teacher_module):
            raise Refusal(f"Distillation.teacher_module must be a function or a class, got {teacher_module!r}.")
        if self.targets is not None and (self._asked(*_INNER) or divergence != "forward_kl"):
            raise Refusal(
                "Distillation.targets holds what a teacher predicts, compared by the forward KL, and neither hidden states nor "
                "maps; leave targets out, or the rest."
            )
        inner = InnerLayers(
            states=self._asked("hidden", "cosine"),
            attention=self._asked("attention"),
            values=self._asked("values"),
            layers=layers,
            relation_heads=relation_heads,
        )
        self._lesson = Lesson(
            teacher,
            inner,
            place=self._place,
            temperature=self.resolved_temperature(),
            targets=targets,
            width=teacher_width,
            quantize=quantize,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        self._forget()

    # -- what is asked for ----------------------------------------------------------------------------------------------

    def weight(self, term: str) -> float:
        """Of one term (``task``, ``soft_targets``, ...), or the ``temperature``: as it was given or as the recipe has it."""
        given = getattr(self, term)
        return float(given if given is not None else objective.RECIPES[self.recipe].get(term, 0.0))

    def _asked(self, *terms: str) -> bool:
        return any(self.weight(term) > 0 for term in terms)

    def resolved_arguments(self) -> dict[str, Any]:
        """With the width of the teacher, who need not be there when a checkpoint is loaded."""
        return {**arguments_of(self), "teacher_width": self._lesson.width}

    def resolved_temperature(self) -> float:
        """As it was given, or as the recipe has it."""
        return self.weight("temperature")

    def _forget(self) -> None:
        self._lesson.forget()
        self._now = objective.Settings(
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.resolved_temperature(),
            scale_t2=self.scale_t2,
            chunk_size=self.chunk_size,
            names=self.name,
        )
        self._caught: own_student.Caught | None = None
        self._soft: Summed | None = None

    # -- registration ---------------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """Registers projections where widths differ, the hooks, and one loss term, which gives all that were asked for."""
        self._forget()
        attachment.on_leave(self._forget)
        attachment.step.own_weight *= self.weight("task")
        if not self._asked("soft_targets", *_INNER):
            return
        module = attachment.module
        if getattr(module, "trains_several_tasks", False):
            self._teach_task(module, attachment)
        elif hasattr(module, "lightning_ft_module"):
            check_student(module, arguments_of(self))
            self._lesson.inner.check(module, attachment)
            self._lesson.join(attachment, self.projection_rate, self._begin)
            attachment.before_step(lambda batch: self._listen(module, batch))
            attachment.loss_term(self.name, self._terms)
        else:
            self._lesson.inner.check_own(module)
            own_student.check(module, arguments_of(self))
            if self.teacher == SELF and self.teacher_module is None:
                attachment.want_reference()
            attachment.edit(
                "hooks", f"distillation:{self.name}", lambda m: self._catch(m, attachment), order=50, again=True
            )
            attachment.loss_term(self.name, self._own_term)

    def _teach_task(self, module: Any, attachment: Attachment) -> None:
        """In `MultiTask`: registers a term of the task that has this callback's name."""
        others = (self.targets, self.teacher_module, self.student, self.outputs, self.mask)
        soft = self.teacher not in (SELF, None) and all(other is None for other in others)
        if not soft or self._asked(*_INNER) or self.weight("task") != 1:
            raise Refusal(
                "Distillation in MultiTask gives one task the soft targets of a teacher that is named: leave targets, student, "
                "outputs, mask, hidden, cosine, attention, values, task and recipe out (MultiTask.weights weighs it), and name a "
                "teacher."
            )
        now, origin = self._now, self._lesson.find(attachment)

        def of_tokens(view: Any, hidden: Tensor, batch: Batch, other: Any, size: int | None) -> Tensor:
            soft = objective.soft_tokens(other, replace(now, size=size))
            return objective.of_tokens(view, hidden, batch, soft, now).sum

        mine = TaskTeacher(
            self.name,
            self.weight("soft_targets"),
            lambda student, teacher, kind: objective.class_losses(student, teacher, kind, now),
            of_tokens,
            self._lesson.known.meet,
            lambda kind: self._note_factor(module, kind),
        )
        mine.check(module, origin if attachment.fits else None)
        options = {"quantize": self.quantize, "dtype": self.dtype}
        attachment.edit(
            "hooks",
            f"distillation:{self.name}",
            lambda m: mine.load(m, attachment, origin, **options),
            order=50,
            again=True,
        )
        attachment.loss_term(f"{self.name}/soft_targets", mine.term)

    def _begin(self) -> None:
        """Student and teacher are there."""
        lesson = self._lesson
        self._now = replace(self._now, layers=lesson.layers, relation_heads=lesson.relation_heads, size=lesson.size)

    def _catch(self, module: pl.LightningModule, attachment: Attachment) -> None:
        """In a module of your own: listens to the part that is the student."""
        if attachment.installed and attachment.fits:
            self._caught, teacher = own_student.catch(
                module, self.student, attachment, self.teacher_module, dtype=self.dtype
            )
            self._lesson.known.meet(teacher.model if teacher is not None else None)
            if teacher is not None:
                teacher.spread(attachment.trainer.strategy)

    # -- the step -------------------------------------------------------------------------------------------------------

    def _listen(self, module: Any, batch: Batch) -> None:
        """Before the student's own step, which may compare words in its own pass over the output layer."""
        self._lesson.listen(batch)
        if module.task not in CLASSIFIES and self._asked("soft_targets"):
            self._soft = objective.soft_tokens(
                self._lesson.at_scored(batch),
                self._now,
                weight=self.weight("soft_targets"),
                kept=self._lesson.by_targets,
            )
            Attachment.of(module).step.ask(self._soft)

    def _terms(self, module: Any, batch: Batch, output: Any) -> list[Term]:
        """Everything that was asked for, of a step of our modules."""
        (student, teacher), now, task = self._lesson.heard(), self._now, module.task
        soft, self._soft = self._soft, None
        found: list[Term] = []
        assert student.result is not None
        if self._asked("soft_targets"):
            if soft is not None:
                term = objective.of_tokens(module.view, student.result, batch, soft, now)
            else:
                several = getattr(module.model.config, "problem_type", None) == "multi_label_classification"
                assert teacher.result is not None
                term = objective.of_classes(student.result, teacher.result, batch, task, several, now)
            found.append(replace(term, weight=self.weight("soft_targets")))
            self._note_factor(module, task)
        project = dict(getattr(module, self._place, {}).items())
        weights = {kind: self.weight(kind) for kind in _INNER}
        return found + objective.of_layers(weights, student, teacher, batch, task, project, now)

    def _own_term(self, module: pl.LightningModule, batch: Any, output: Any) -> Term:
        """Soft targets of what a part of a user's own module gave in its own step."""
        assert self._caught is not None
        student, teacher = self._caught.compared(batch, self.mask)
        kind = own_student.kind_of(student, self.outputs)
        losses = objective.class_losses(student, teacher, kind, self._now)
        term = Term(f"{self.name}/soft_targets", losses.sum(), float(len(losses)), "row", self.weight("soft_targets"))
        self._note_factor(module, kind)
        return term

    def _note_factor(self, module: pl.LightningModule, kind: str) -> None:
        factor = 1.0 if kind in ("numbers", "regression") else self._now.factor  # numbers have no temperature
        Attachment.of(module).step.observe({f"{self.name}/t2": (torch.tensor(factor, device=module.device), 1.0)})

    # -- state ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """By which a run that resumes knows its teacher; None for the model itself."""
        return {"teacher": self._lesson.known.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The teacher of the run that is resumed, which must be this one's."""
        self._lesson.known.expect(state_dict["teacher"])
