"""What our LightningModules share: loading a base, its edits, the optimizer, the schedule, generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_ft.engine import summary
from lightning_ft.engine.arguments import check_arguments, describe
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import THAW
from lightning_ft.engine.generation import Prompt, generate
from lightning_ft.engine.optimizer import FULL_LR, Schedule, build_optimizer, build_scheduler, parameter_groups
from lightning_ft.engine.technique import Attached
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import Admission
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.causal import CausalLM
from lightning_ft.models.classifier import CLASSIFIES, Classifier
from lightning_ft.models.compiling import check_backend, compile_blocks
from lightning_ft.models.dtype import apply_dtype_policy, compute_dtype
from lightning_ft.models.load import load_tokenizer
from lightning_ft.models.load_task import Task, load_for_task
from lightning_ft.models.quantize import Mode, check_mode, quantize_, try_packed
from lightning_ft.models.seq2seq import Seq2SeqLM
from lightning_ft.models.sharding import block_modules
from lightning_ft.nn.packed import is_packed

DtypePolicy = Literal["auto", "float32", "bfloat16", "pure_bfloat16"]
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class FineTuningModule(pl.LightningModule):
    """The base of our modules: an objective over a base model that is loaded when the run begins.

    Subclasses store their own arguments and define the steps; arguments are described where they are public, on `SFT`.
    """

    lightning_ft_module = True
    task: Task = "causal_lm"
    """What the base predicts; a subclass may make it an argument, with ``labels`` and ``multi_label`` beside it."""
    learns_from: str | None = None
    """Kind of rows that it needs, a key of `lightning_ft.engine.answers.ROWS`; None: any, as far as can be said beforehand."""
    labels: list[str] | None = None
    multi_label: bool = False
    head_lr: float | None = None
    """Peak rate of a head that classifies; None: that of the rest."""

    def __init__(
        self,
        base: str,
        *,
        lr: float | None,
        weight_decay: float,
        warmup_steps: int | None,
        schedule: Schedule,
        optimizer: OptimizerFactory | None,
        base_dtype: DtypePolicy,
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"],
        gradient_checkpointing: bool,
        trust_remote_code: bool,
        revision: str | None,
        quantize: Mode | None = None,
        compile_blocks: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.optimizer = optimizer
        self.base_dtype = base_dtype
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.quantize = quantize
        self.compile_blocks = compile_blocks
        self.model: Any = None
        self.admission: Admission | None = None
        self._tokenizer: Any = None
        self._view: Any = None
        self.new_names: frozenset[str] = frozenset()

    # -- loading and edits ------------------------------------------------------------------------------------------

    @property
    def loads(self) -> Task:
        """The task that the base is loaded for: the module's own, unless a subclass learns something else by such a model."""
        return self.task

    def configure_callbacks(self) -> list[pl.Callback]:
        """The attachment joins also when no technique is there."""
        return [Attached()]

    def configure_model(self) -> None:
        """Loads the base, once; techniques edit it right after."""
        if self.model is None:
            labels, multi_label = self._classes()
            self.model, self._tokenizer, self.new_names = load_for_task(
                self.loads,
                self.base,
                labels=labels,
                multi_label=multi_label,
                dtype_policy=self.base_dtype,
                attention=self.attention,
                trust_remote_code=self.trust_remote_code,
                revision=self.revision,
                seed=Attachment.of(self).seed,
            )
            self.model.train()  # Hugging Face returns eval mode and Lightning leaves it so: no dropout, silently
        if self.admission is None:
            self.admission = admit_task(self.model, self.loads, packing=True)
        if getattr(self.datamodule, "packing", False) and not self.admission.packing:
            raise Refusal(
                f"{self.base} cannot take packed rows, because {self.admission.packing_reason}; set --data.packing false."
            )

    @property
    def datamodule(self) -> Any:
        """The data module of the present run, or None."""
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    def _classes(self) -> tuple[list[str] | None, bool]:
        """Names of the classes and whether several may hold: as given, else as the data say."""
        asked = getattr(self.datamodule, "label_names", None)
        if self.loads not in CLASSIFIES or not callable(asked):
            return self.labels, self.multi_label
        theirs = asked()
        if self.labels is not None and theirs is not None and list(theirs) != list(self.labels):
            raise Refusal(
                f"The module's labels {self.labels} are not the data's {theirs}, so class numbers would mean something else; "
                "give the data the same labels (data.labels), or leave the module's out."
            )
        return theirs, self.multi_label or self.datamodule.multi_label()

    def register(self, attachment: Attachment) -> None:
        """The base's own edits: packing, a head that trains, dtypes once it is known what is trained, checkpointing."""
        if self.quantize is not None:
            self._check_quantize(attachment)
            attachment.edit("quantise", "quantize", self._quantise)
        if self.loads in CLASSIFIES:
            attachment.edit("freeze", "train the head", self._train_head, order=THAW)
        attachment.edit("dtype", "dtype", self._apply_dtype)
        if self.gradient_checkpointing:
            attachment.edit("checkpointing", "gradient_checkpointing", self._checkpoint_activations)
        if self.compile_blocks is not None and self._trainer is not None:  # `lightning_ft.load` compiles nothing
            check_backend(self.compile_blocks, self._root_device())
            attachment.edit("compile", "compile_blocks", self._compile, again=True)

    def _check_quantize(self, attachment: Attachment) -> None:
        """Before anything is loaded: packed weights have no gradient, so something else must be what trains."""
        assert self.quantize is not None
        check_mode(self.quantize)
        ours = type(self).__module__.startswith("lightning_ft.")  # a user's subclass may inject adapters by itself
        if ours and not any("model" in technique.traits.edits for technique in attachment.techniques):
            self._refuse_full_training()

    def _refuse_full_training(self) -> None:
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            raise Refusal(
                f"quantize {self.quantize!r} packs the base's weights, which cannot be trained then, and nothing else is there to "
                "train; add a technique, such as LoRA (--lora.r 16), or leave quantize out."
            )

    def _quantise(self, module: pl.LightningModule) -> None:
        head = self.view.head_parameter_names() if self.loads in CLASSIFIES else ()
        assert self.quantize is not None
        quantize_(
            self.model, self.quantize, skip={name.rpartition(".")[0] for name in head}, device=self._root_device()
        )
        try_packed(self.model, self.base)

    def _root_device(self) -> torch.device:
        return self._trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")

    def _train_head(self, module: pl.LightningModule) -> None:
        """A new task's head is trained whatever else is: unless it is frozen by name, which comes later."""
        parameters = dict(self.model.named_parameters())
        for name in self.view.head_parameter_names():
            parameters[name].requires_grad_(True)

    def _apply_dtype(self, module: pl.LightningModule) -> None:
        if self.quantize is not None and all(p.requires_grad for p in self.model.parameters() if not is_packed(p)):
            self._refuse_full_training()  # nobody has frozen what is left of the base
        apply_dtype_policy(
            self.model,
            compute_dtype(self.base_dtype, self._root_device()),
            frozen_only=self.base_dtype != "pure_bfloat16",
            trainable={name.removeprefix("model.") for name in Attachment.of(self).late},
            defer=self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy),
        )

    def _checkpoint_activations(self, module: pl.LightningModule) -> None:
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _compile(self, module: pl.LightningModule) -> None:
        assert self.compile_blocks is not None
        units = getattr(self.trainer.strategy, "unit_modules", block_modules)
        Attachment.of(self).on_leave(compile_blocks(units(self), backend=self.compile_blocks))

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, loaded at first use without its weights."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.base, trust_remote_code=self.trust_remote_code, revision=self.revision
            )
        return self._tokenizer

    @property
    def view(self) -> Any:
        """The base as its parts: a `CausalLM`, `Seq2SeqLM` or `Classifier`, by the task."""
        if self._view is None or self._view.model is not self.model:
            if self.loads in CLASSIFIES:
                self._view = Classifier(self.model, self.loads, self.new_names)
            else:
                self._view = Seq2SeqLM(self.model) if self.loads == "seq2seq_lm" else CausalLM(self.model)
        return self._view

    # -- optimisation -----------------------------------------------------------------------------------------------

    def resolved_lr(self) -> float:
        """The rate of this run: ``lr``, else the smallest that a technique suggests, else that of full training."""
        if self.lr is not None:
            return self.lr
        suggested = [t.traits.suggested_lr for t in Attachment.of(self).techniques if t.traits.suggested_lr is not None]
        return min(suggested, default=FULL_LR)

    def own_rates(self) -> dict[str, float]:
        """Factors of the rate that the module itself asks for, by parameter name; techniques' come on top."""
        if self.head_lr is None:
            return {}
        factor = self.head_lr / self.resolved_lr()
        return {f"model.{name}": factor for name in self.view.head_parameter_names()}

    def configure_optimizers(self) -> Any:
        """AdamW (or ``optimizer``) over what is trainable after all edits, warmed up and decayed."""
        attachment, rates = Attachment.of(self), self.own_rates()
        for name, factor in attachment.rates.items():
            rates[name] = rates.get(name, 1.0) * factor
        groups = parameter_groups(
            self,
            lr=self.resolved_lr(),
            weight_decay=self.weight_decay,
            rates=rates,
            late=attachment.late,
            apart=attachment.grouped,
        )
        optimizer = build_optimizer(groups, self._optimizer_factory())
        scheduler = build_scheduler(
            optimizer, total=self._planned_steps(), warmup=self.warmup_steps, schedule=self.schedule
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _planned_steps(self) -> list[int]:
        """Optimizer steps between two beginnings of the schedule: one number, but for a stream of tasks."""
        planned = getattr(self.datamodule, "optimizer_steps", None)
        if callable(planned):
            return list(planned())
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise Refusal(
                "The length of this run is not known beforehand, so its learning rate cannot be planned; give trainer.max_epochs "
                "or trainer.max_steps (beside max_time, which may end it sooner)."
            )
        return [int(steps)]

    def _optimizer_factory(self) -> OptimizerFactory | None:
        """What makes the optimizer of its groups; None is AdamW."""
        return self.optimizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with a run whose base was packed otherwise; anything else may be measured on it.

        Raises:
            Refusal: ``The checkpoint was trained on a base in nf4, and this one is not packed; ...``
        """
        recipe = (checkpoint.get("lightning_ft") or {}).get("module")
        if recipe is None or self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        before = recipe["init_args"].get("quantize")
        if before != self.quantize:
            was, now = (f"in {mode}" if mode else "that is not packed" for mode in (before, self.quantize))
            raise Refusal(
                f"The checkpoint was trained on a base {was}, and this run has one {now}, which computes something else; set "
                f"quantize to {before or 'null'}, or start a new fit from its weights (init_from)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the checkpoint rule also for weights-only files saved after the run, of which callbacks hear nothing."""
        Attachment.of(self).save(checkpoint)

    def on_fit_start(self) -> None:
        """Says once what is trained, what it costs and what a row looks like."""
        if self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None:
            summary.announce(self, self.trainer)

    # -- use ----------------------------------------------------------------------------------------------------------

    @property
    def writes(self) -> bool:
        """Whether it has a language head, so that `generate` gives answers."""
        return self.loads not in CLASSIFIES

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0
    ) -> list[str]:
        """Answers to prompts (strings or chats) by the model as it is; see `lightning_ft.engine.generation.generate`.

        Raises:
            Refusal: for a task that writes no text.
        """
        if not self.writes:
            tasks = f"The task {self.task} gives" if self.task is not None else "The tasks of this model give"
            raise Refusal(
                f"{tasks} classes or numbers and write{'s' if self.task is not None else ''} no text; use predict."
            )
        return generate(
            self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )

    @contextmanager
    def reference(self, name: str = "base") -> Iterator[None]:
        """The model at a snapshot: the bare ``base``, or ``start``, when the present fit began; without gradients."""
        with Attachment.of(self).reference(name):
            yield

    @contextmanager
    def exported(self) -> Iterator[str]:
        """Inside, the model is as other tools are to have it; gives a sentence to say about that, mostly none."""
        yield ""

    def check(self) -> None:
        """Refuses arguments out of bounds; subclasses call it last in their constructor."""
        check_arguments(self)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return describe(self)
