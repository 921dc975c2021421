"""Distillation: a student learns what a teacher makes of the same rows."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_ft.engine import own_student, teacher_targets
from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.frozen import Frozen
from lightning_ft.engine.module import DtypePolicy
from lightning_ft.engine.task_teacher import TaskTeacher
from lightning_ft.engine.teacher import (
    SELF,
    Origin,
    Teacher,
    fingerprint_of,
    load_teacher,
    origin_of,
    own_head,
    vocabulary_of,
)
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.distillation import Divergence, LayerMap, layer_map
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import evaluating
from lightning_ft.models.classifier import CLASSIFIES
from lightning_ft.models.observed import Observer, check_maps
from lightning_ft.models.quantize import Mode, check_mode
from lightning_ft.models.vocabulary import shared_vocabulary, sliced
from lightning_ft.nn.seeding import seeded_generator
from lightning_ft.objectives import distillation as objective

RECIPES: dict[str, dict[str, float]] = {
    "soft_targets": {"task": 1.0, "soft_targets": 1.0, "temperature": 1.0},
    # Sanh et al., 2019, and their code: 5 soft targets + 2 task + 1 cosine of the last hidden state, temperature 2.
    "distilbert": {"task": 2.0, "soft_targets": 5.0, "cosine": 1.0, "temperature": 2.0},
    # Wang et al., 2020, equation 8: the last layer's maps and value relations, and nothing else.
    "minilm": {"task": 0.0, "soft_targets": 0.0, "attention": 1.0, "values": 1.0, "temperature": 1.0},
}
"""Recipe -> its weights and its temperature; what it does not name is 0."""
_INNER = ("hidden", "cosine", "attention", "values")


class Distillation(Technique):
    """Lets the model that you train imitate a teacher: what it predicts, and if you like what it computes on the way.

    ``task L + soft_targets T^2 KL(q || p) + hidden |h_s W - h_t|^2 / D + cosine (1 - cos) + attention KL + values KL`` is what it
    minimises: L the module's own loss, p and q softmax of the student's and the teacher's logits over the temperature T. Each
    term is a mean over scored tokens (language models, words) or rows, exact for any batch size, accumulation, packing and
    number of ranks.
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
            holds likely, ``jensen_shannon`` lies between.
        beta: of ``jensen_shannon``: towards 0 it becomes the forward KL, towards 1 the reverse.
        temperature: T, above 1 shows more of what the teacher holds unlikely. None: the recipe's.
        scale_t2: whether soft targets are multiplied by T^2, so that T does not change their weight (Hinton et al., 2015).
        layers: which layers are compared: the ``last``; ``uniform``, each of the student's with the teacher's at the same height;
            or pairs {student: teacher}, blocks counted from 1, 0 being the embeddings.
        relation_heads: into how many heads values are split; None: as many as both models have.
        projection_rate: factor of the learning rate of the matrices W that hidden states of another width get.
        teacher_width: of its hidden states; None asks the teacher. A checkpoint remembers it, so that it loads without the teacher.
        targets: a folder that `lightning-ft cache-teacher` wrote; no teacher is loaded then. None: the teacher is.
        student: in a module of your own, the part whose outputs are compared; None: its only child.
        mask: in a module of your own, the batch's entry that is True at the outputs to compare; None: the attention mask that the
            part was called with, if it was, else all.
        quantize: pack the teacher's linear layers into 4 or 8 bits, see `SFT`. None: not.
        dtype: of the teacher's weights, as ``base_dtype`` of `SFT`.
        chunk_size: tokens whose logits exist at one time.
        trust_remote_code: run Python code that the teacher's repository brings; only for authors you trust.
        revision: branch, tag or commit of the teacher's Hugging Face id; None is its main branch.
        name: tells two of them apart; in `MultiTask` the task that is taught.

    The teacher is in eval mode, without gradients, outside the module: no checkpoint, optimizer or DDP bucket holds it. Labels and
    vocabularies are compared by name before anything is trained.

    Logs:
        ``train/NAME/soft_targets``, ``hidden``, ``cosine``, ``attention``, ``values``, before their weights, NAME being ``name``;
        and ``train/NAME/t2``, the factor that is in the first.

    Cost: a forward pass of the teacher; of language models a second pass over the student's output layer, a chunk at a time.

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
        self.mask = mask
        self.quantize = quantize
        self.dtype = dtype
        self.chunk_size = chunk_size
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.name = name
        self.check()
        if teacher_module is not None and not callable(teacher_module):
            raise Refusal(f"Distillation.teacher_module must be a function or a class, got {teacher_module!r}.")
        if self.targets is not None and (self._asked(*_INNER) or divergence != "forward_kl"):
            raise Refusal(
                "Distillation.targets holds what a teacher predicts, compared by the forward KL, and neither hidden states nor "
                "maps; leave targets out, or the rest."
            )
        self._width: int | None = None
        self._known: str | None = None
        self._expected: str | None = None
        self._forget()

    # -- what is asked for ----------------------------------------------------------------------------------------------

    def weight(self, term: str) -> float:
        """Of one term (``task``, ``soft_targets``, ``hidden``, ...), as it was given or as the recipe has it."""
        given = getattr(self, term)
        return float(given if given is not None else RECIPES[self.recipe].get(term, 0.0))

    def _asked(self, *terms: str) -> bool:
        return any(self.weight(term) > 0 for term in terms)

    def resolved_arguments(self) -> dict[str, Any]:
        """With the width of the teacher, who need not be there when a checkpoint is loaded."""
        return {**arguments_of(self), "teacher_width": self._width or self.teacher_width}

    def resolved_temperature(self) -> float:
        """As it was given, or as the recipe has it."""
        return float(self.temperature if self.temperature is not None else RECIPES[self.recipe]["temperature"])

    def _settings(self) -> objective.Settings:
        return objective.Settings(
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.resolved_temperature(),
            scale_t2=self.scale_t2,
            chunk_size=self.chunk_size,
            relation_heads=self.relation_heads,
            names=self.name,
        )

    def _forget(self) -> None:
        self._now = self._settings()
        self._students: Observer | None = None
        self._teacher: Teacher | None = None
        self._kept: teacher_targets.TeacherTargets | None = None
        self._caught: own_student.Caught | None = None
        self._checked = False

    # -- registration ---------------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """Registers projections where widths differ, the hooks, and one loss term, which gives all that were asked for."""
        self._forget()
        attachment.on_leave(self._forget)
        attachment.step.own_weight *= self.weight("task")
        if not self._asked("soft_targets", *_INNER):
            return
        module = attachment.module
        ours = hasattr(module, "lightning_ft_module")
        if hasattr(module, "rows_seen"):
            self._teach_task(module, attachment)
            return
        if ours and not getattr(module, "imitates", False):
            raise Refusal(
                "Distillation compares what a model makes of the answers that it imitates, as SFT does, and "
                f"{type(module).__name__} compares answers with one another; distil first, or leave it out."
            )
        origin = self._origin(ours)
        if ours and self.student is None and self.mask is None and self.teacher_module is None:
            self._check_ours(module, attachment)
            if self._asked("hidden", "cosine"):
                attachment.edit("inject", f"distillation:{self.name}", lambda m: self._project(m, attachment, origin))
        elif ours and self.teacher_module is not None:
            raise Refusal("Distillation.teacher_module is for modules of your own; SFT's teacher is named by teacher.")
        if not ours and self._asked(*_INNER):
            raise Refusal(
                f"Distillation knows the layers of this library's modules; of {type(module).__name__} only what its part gives "
                "can be compared: leave hidden, cosine, attention and values out, and recipe with them."
            )
        if self.teacher == SELF and self.teacher_module is None and self.targets is None:
            attachment.want_reference()
        attachment.edit(
            "hooks",
            f"distillation:{self.name}",
            lambda m: self._prepare(m, attachment, origin, ours),
            order=50,
            again=True,
        )
        attachment.loss_term(self.name, self._terms if ours else self._own_term)

    def _teach_task(self, module: Any, attachment: Attachment) -> None:
        """In `MultiTask`: registers a term of the task that has this callback's name."""
        soft = self.targets is None and self.teacher not in (SELF, None) and self.teacher_module is None
        if not soft or self._asked(*_INNER) or self.weight("task") != 1:
            raise Refusal(
                "Distillation in MultiTask gives one task the soft targets of a teacher that is named: leave targets, hidden, "
                "cosine, attention, values, task and recipe out (MultiTask.weights weighs the task itself), and name a teacher."
            )
        now, origin = self._now, self._origin(True)
        mine = TaskTeacher(
            self.name,
            self.weight("soft_targets"),
            lambda student, teacher, kind: objective.class_losses(student, teacher, kind, now),
            lambda *seen: objective.of_tokens(*seen[:-1], replace(now, size=seen[-1])).sum,
            self._know,
        )
        mine.check(module)
        options = {"quantize": self.quantize, "dtype": self.dtype}
        attachment.edit(
            "hooks",
            f"distillation:{self.name}",
            lambda m: mine.load(m, attachment, origin, **options),
            order=50,
            again=True,
        )
        attachment.loss_term(f"{self.name}/soft_targets", mine.term)

    def _origin(self, ours: bool) -> Origin | None:
        """Where the teacher is; None for the model itself, a function, or targets that were kept."""
        if self.quantize is not None:
            check_mode(self.quantize)
        if self.teacher == SELF or self.teacher_module is not None or self.targets is not None:
            return None
        if not ours:
            raise Refusal(
                f"Distillation.teacher names {self.teacher!r}, but what calls it in a module of your own is not known; give "
                "teacher_module, a function that builds it."
            )
        return origin_of(self.teacher, trust_remote_code=self.trust_remote_code, revision=self.revision)

    def _check_ours(self, module: Any, attachment: Attachment) -> None:
        """What can be refused before anything is loaded."""
        before = next((t for t in attachment.techniques if t.traits.slot in ("prefix", "prompt")), None)
        if before is not None and self._asked(*_INNER):
            raise Refusal(
                f"{type(before).__name__} puts tokens before rows that the teacher lacks, so that layers cannot be compared; "
                "leave hidden, cosine, attention and values out."
            )
        if self._asked("attention") and module.attention != "eager":
            raise Refusal(
                f"Distillation.attention compares attention maps, which {module.attention!r} attention does not keep; set "
                "--model.attention eager (and --data.packing false)."
            )
        if self._asked("attention", "values") and getattr(module.datamodule, "packing", None):
            raise Refusal(
                "Distillation.attention and values compare the maps of single rows, and the data are packed; set --data.packing "
                "false."
            )
        if self.targets is not None and module.task in CLASSIFIES:
            raise Refusal(
                f"Distillation.targets keeps the likeliest tokens of language models, and the task is {module.task}; leave it out."
            )

    # -- edits ----------------------------------------------------------------------------------------------------------

    def _project(self, module: Any, attachment: Attachment, origin: Origin | None) -> None:
        """Adds a matrix for each mapped layer where the widths differ: parameters of the module, trained and saved with it."""
        view = module.view
        own = int(view.config.hidden_size)
        width = self.teacher_width or (origin.width() if origin is not None else own)
        self._width = width
        if width == own:
            return
        mapped = self.layers if isinstance(self.layers, dict) else None
        student = Observer(view).layers
        numbers = (
            sorted(mapped) if mapped is not None else [student] if self.layers == "last" else range(1, student + 1)
        )
        matrices = nn.ModuleDict()
        for number in numbers:
            path = f"{self._place}.layer_{number}"
            matrix = nn.Linear(own, width, bias=False, device="cpu", dtype=torch.float32)
            drawn = torch.randn(
                width, own, generator=seeded_generator(attachment.seed, path), device="cpu", dtype=torch.float32
            )
            matrix.weight = nn.Parameter(drawn * own**-0.5)
            matrices[f"layer_{number}"] = matrix
        module.add_module(self._place, matrices)
        if self.projection_rate != 1.0:
            names = [f"{self._place}.{key}.weight" for key in matrices]
            attachment.rate(dict.fromkeys(names, float(self.projection_rate)))

    @property
    def _place(self) -> str:
        return f"{self.name}_projections"

    def _prepare(self, module: Any, attachment: Attachment, origin: Origin | None, ours: bool) -> None:
        """Finds or loads the teacher, and begins to listen to the student."""
        if not attachment.installed or attachment.trainer.state.fn != TrainerFn.FITTING:
            return  # `lightning_ft.load` and evaluations need no teacher
        device = attachment.trainer.strategy.root_device
        if not ours:
            teacher = Frozen(self.teacher_module()) if self.teacher_module is not None else None
            self._caught = own_student.catch(module, self.student, attachment, teacher)
            self._know(teacher.model if teacher is not None else None)
            return
        self._students = self._listen(module, attachment)
        if self.targets is not None:
            self._open_targets(module)
        elif origin is None:
            self._teach_self(module, attachment)
        else:
            self._load(module, attachment, origin, device)
        if module.task not in CLASSIFIES and self._teacher is not None and origin is not None:
            used = shared_vocabulary(module.tokenizer, origin.tokenizer())
            size = sliced(vocabulary_of(module.view), self._teacher.vocabulary, used)
            self._now = replace(self._now, size=size)

    def _listen(self, module: Any, attachment: Attachment) -> Observer:
        view = module.view
        layers = Observer(view).layers
        wanted = self.layers if isinstance(self.layers, dict) else layer_map(self.layers, layers, layers)
        blocks = [number for number in wanted if number > 0]
        observer = Observer(
            view,
            states=self._asked("hidden", "cosine"),
            maps=blocks if self._asked("attention") else (),
            values=blocks if self._asked("values") else (),
        )
        observer.attach()
        observer.watch()
        attachment.on_leave(observer.detach)
        if self._asked("attention", "values") and module.admission.packing and module.datamodule.packing is not False:
            raise Refusal(
                "Distillation.values compares single rows, and the data would be packed; set --data.packing false."
            )
        return observer

    def _teach_self(self, module: Any, attachment: Attachment) -> None:
        assert self._students is not None
        view = module.view

        @contextmanager
        def earlier() -> Any:
            with attachment.reference(), evaluating(view.model):
                yield

        head = None if module.task in CLASSIFIES else own_head(view, earlier)
        self._teacher = Teacher(self._students, earlier, head)
        self._map(view, view)
        self._know(None)

    def _load(self, module: Any, attachment: Attachment, origin: Origin, device: torch.device) -> None:
        shared_vocabulary(module.tokenizer, origin.tokenizer())
        labels = module.view.labels if module.task in CLASSIFIES else None
        view, frozen = load_teacher(
            origin,
            module.task,
            labels=labels,
            multi_label=getattr(module.model.config, "problem_type", None) == "multi_label_classification",
            packing=bool(module.admission.packing) and getattr(module.datamodule, "packing", None) is not False,
            attention="eager" if self._asked("attention") else "auto",
            quantize=self.quantize,
            dtype=self.dtype,
            device=device,
        )
        self._map(module.view, view)
        blocks = [number for number in self._now.layers.values() if number > 0]
        observer = Observer(
            view,
            states=self._asked("hidden", "cosine"),
            maps=blocks if self._asked("attention") else (),
            values=blocks if self._asked("values") else (),
        )
        observer.attach()
        if self._asked("hidden", "cosine"):
            self._check_projections(module, observer.width)
        self._teacher = Teacher(observer, partial(frozen.on, device))
        self._know(frozen.model)

    def _check_projections(self, module: Any, width: int) -> None:
        matrices = getattr(module, self._place, None)
        given = {matrix.out_features for matrix in matrices.values()} if matrices is not None else set()
        named = set(matrices) if matrices is not None else set()
        fits = given == {width} if given else width == int(module.view.config.hidden_size)
        if not fits or (given and {f"layer_{n}" for n in self._now.layers} - named):
            raise Refusal(
                f"The module's projections do not fit a teacher whose hidden states have {width} numbers; leave teacher_width "
                "out, or begin with a new module."
            )
        self._width = width

    def _map(self, student: Any, teacher: Any) -> None:
        """Which layers meet, and into how many heads their values are split."""
        if not self._asked(*_INNER):
            return
        sizes = Observer(student).layers, Observer(teacher).layers
        layers = layer_map(self.layers, *sizes)
        if self._asked("attention", "values"):
            layers = {own: other for own, other in layers.items() if own > 0 and other > 0}
        heads = [int(view.config.num_attention_heads) for view in (student, teacher)]
        if self._asked("attention") and heads[0] != heads[1]:
            raise Refusal(
                f"Distillation.attention compares maps head by head, and the student has {heads[0]} heads where the teacher has "
                f"{heads[1]}; compare values instead, with relation_heads."
            )
        relation = self.relation_heads
        if self._asked("values") and relation is None:
            own, other = (
                int(getattr(view.config, "num_key_value_heads", None) or n)
                for view, n in zip((student, teacher), heads, strict=True)
            )
            if own != other:
                raise Refusal(
                    f"Distillation.values: the student has {own} heads of values and the teacher {other}; say by relation_heads "
                    "into how many both are to be split."
                )
            relation = own
        self._now = replace(self._now, layers=layers, relation_heads=relation)

    def _open_targets(self, module: Any) -> None:
        assert self.targets is not None
        self._kept = teacher_targets.TeacherTargets(Path(self.targets).expanduser())
        self._kept.check(module.tokenizer, self._now.temperature)
        width = vocabulary_of(module.view)
        self._now = replace(self._now, size=sliced(width, self._kept.about.vocabulary, self._kept.about.used))
        self._known = self._kept.about.teacher
        self._agree()

    def _know(self, module: nn.Module | None) -> None:
        self._known = fingerprint_of(module) if module is not None else None
        self._agree()

    def _agree(self) -> None:
        if self._expected is not None and self._known != self._expected:
            raise Refusal(
                "The run was begun with another teacher: its weights differ from those that the checkpoint knows; give the same, "
                "or start a new fit."
            )

    # -- the step -------------------------------------------------------------------------------------------------------

    def _terms(self, module: Any, batch: Batch, output: Any) -> list[Term]:
        """Everything that was asked for, of a step of our modules."""
        assert self._students is not None
        seen, now, task = self._students.take(), self._now, module.task
        assert seen.result is not None
        found: list[Term] = []
        if self._kept is not None:
            kept = self._kept.of(batch, module.device)
            term = objective.of_tokens(module.view, seen.result, batch, kept.block, now, kept=True)
            return [replace(term, weight=self.weight("soft_targets"))]
        assert self._teacher is not None
        said = self._teacher.see(batch)
        assert said.result is not None
        if self._asked("soft_targets"):
            if task in CLASSIFIES:
                several = getattr(module.model.config, "problem_type", None) == "multi_label_classification"
                term = objective.of_classes(seen.result, said.result, batch, task, several, now)
            else:
                chosen = said.result.reshape(-1, said.result.shape[-1])[batch.scored]  # (N, D)
                teacher, size = self._teacher, now.size
                term = objective.of_tokens(
                    module.view, seen.result, batch, lambda rows: teacher.logits(chosen[rows])[..., :size], now
                )
            found.append(replace(term, weight=self.weight("soft_targets")))
            module_step = Attachment.of(module).step
            module_step.observe({f"{self.name}/t2": (torch.tensor(now.factor, device=module.device), 1.0)})
        if self._asked("attention") and not self._checked:
            check_maps(seen, list(now.layers), "The student")
            check_maps(said, list(now.layers.values()), "The teacher")
            self._checked = True
        project = getattr(module, self._place, {})
        for kind in ("hidden", "cosine"):
            if self._asked(kind):
                term = objective.of_states(kind, seen, said, batch, task, dict(project.items()), now)
                found.append(replace(term, weight=self.weight(kind)))
        if self._asked("attention"):
            found.append(replace(objective.of_maps(seen, said, batch, now), weight=self.weight("attention")))
        if self._asked("values"):
            found.append(replace(objective.of_values(seen, said, batch, now), weight=self.weight("values")))
        return found

    def _own_term(self, module: pl.LightningModule, batch: Any, output: Any) -> Term:
        """Soft targets of what a part of a user's own module gave in its own step."""
        assert self._caught is not None
        student, teacher = self._caught.compared(batch, self.mask)
        kind = "numbers" if student.shape[-1] == 1 else "one"
        losses = objective.class_losses(student, teacher, kind, self._now)
        term = Term(f"{self.name}/soft_targets", losses.sum(), float(len(losses)), "row", self.weight("soft_targets"))
        Attachment.of(module).step.observe(
            {f"{self.name}/t2": (torch.tensor(self._now.factor, device=losses.device), 1.0)}
        )
        return term

    # -- state ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """By which a run that resumes knows its teacher; None for the model itself."""
        return {"teacher": self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The teacher of the run that is resumed, which must be this one's."""
        self._expected = state_dict["teacher"]
        if self._students is not None or self._caught is not None:
            self._agree()
        self._expected = None
