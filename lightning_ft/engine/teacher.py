"""Teachers: finding and loading one, and what it says of a batch, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.checkpoints import record_of
from lightning_ft.engine.frozen import Frozen
from lightning_ft.engine.init_from import is_adapter_folder
from lightning_ft.engine.loading import load
from lightning_ft.engine.precomputed import digest
from lightning_ft.formats.peft import load_peft_
from lightning_ft.formats.peft_reading import read_json, read_peft
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import evaluating
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.causal import CausalLM
from lightning_ft.models.classifier import CLASSIFIES, Classifier
from lightning_ft.models.dtype import compute_dtype
from lightning_ft.models.load import load_config, load_tokenizer, resolve
from lightning_ft.models.load_task import has_head, load_for_task
from lightning_ft.models.observed import Observer, Seen
from lightning_ft.models.quantize import Mode, quantize_
from lightning_ft.models.seq2seq import Seq2SeqLM
from lightning_ft.nn.packed import has_packed_weights
from lightning_ft.nn.select import matches

SELF = "self"


@dataclass(frozen=True)
class Origin:
    """Where a teacher comes from.

    Attributes:
        name: what the user wrote.
        kind: a base model, an adapter folder (on its base), or a checkpoint of this library.
        base: the base model that it is, or that it stands on.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model.
    """

    name: str
    kind: Literal["base", "adapter", "checkpoint"]
    base: str
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def _hub(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}

    def tokenizer(self) -> Any:
        """Of its base, without its weights."""
        return load_tokenizer(self.base, **self._hub)

    def config(self) -> Any:
        """Of its base, without its weights."""
        return load_config(self.base, **self._hub)

    def check_head(self, task: str | None) -> None:
        """Refuses a base whose head for a task would be random; an adapter brings one, and a checkpoint has it.

        Raises:
            Refusal: what it lacks, and how to get it.
        """
        if self.kind == "base" and task is not None and task in CLASSIFIES and not has_head(task, self.config()):
            raise Refusal(
                f"The teacher {self.name} has no trained head for {task}, so that it has nothing to teach yet; train it first, and "
                "give its checkpoint (runs/NAME/checkpoints/last.ckpt) or its merged folder."
            )

    def width(self) -> int:
        """Of its hidden states."""
        config = self.config()
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return int(text.hidden_size)


def origin_of(
    teacher: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    argument: str = "Distillation.teacher",
) -> Origin:
    """Finds a teacher without loading its weights.

    Args:
        teacher: a checkpoint, an adapter folder, or a base: a folder, ``starter:NAME`` or a hub id.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model.
        argument: what named it, for messages.

    Raises:
        Refusal: nothing is there, or nothing that can teach.
    """
    path = Path(teacher).expanduser()
    if path.is_file() or (path / ".metadata").exists():
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.is_file() else {}
        except Exception as error:
            raise Refusal(f"The teacher {teacher} cannot be read as a checkpoint: {error}") from error
        recipe = record_of(checkpoint)["module"] if path.is_file() else None
        if recipe is None:
            raise Refusal(
                f"The teacher {teacher} is a checkpoint of a module of your own, or of shards; export it (lightning-ft merge), or "
                "give teacher_module, a function that builds the teacher."
            )
        return Origin(teacher, "checkpoint", str(recipe["init_args"]["base"]))
    if is_adapter_folder(path) and (path / "adapter_config.json").exists():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise Refusal(f"The adapter {teacher} does not say which base it stands on; merge it, or name the base.")
        return Origin(teacher, "adapter", str(base), trust_remote_code, revision)
    if path.suffix == ".ckpt":
        raise Refusal(
            f"{argument} names the checkpoint {teacher}, which is not there; train the teacher first (fit --name NAME leaves "
            "runs/NAME/checkpoints/last.ckpt), or name another."
        )
    try:
        resolve(teacher, revision=revision)
    except Refusal as refusal:
        raise Refusal(f"{argument}: {refusal}") from None
    return Origin(teacher, "base", teacher, trust_remote_code, revision)


def load_teacher(
    origin: Origin,
    task: str,
    *,
    labels: list[str] | None = None,
    multi_label: bool = False,
    packing: bool = False,
    attention: str = "auto",
    quantize: Mode | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[Any, Frozen[Any]]:
    """A teacher with its weights, frozen, as a view of the task.

    Args:
        origin: where it comes from.
        task: what it predicts, as of `SFT`.
        labels: the student's classes, which must be the teacher's.
        multi_label: whether a row may have several.
        packing: whether it will read packed rows.
        attention: as of `SFT`; of a checkpoint ``auto`` is what it was trained with.
        quantize: pack its linear layers.
        dtype: of its weights, as ``base_dtype`` of `SFT`.
        device: where it computes.

    Returns:
        The view and the holder of its model.

    Raises:
        Refusal: it predicts something else, has no trained head, or cannot read packed rows.
    """
    view = _loaded(origin, task, labels, multi_label, attention)
    model = view.model
    if labels is not None and task in CLASSIFIES and task != "regression" and view.labels != list(labels):
        raise Refusal(
            f"The teacher's classes {view.labels} are not the student's {list(labels)}, so that their numbers mean something else; "
            "give the student the teacher's labels (--model.labels)."
        )
    if packing:
        admission = admit_task(model, task, packing=True)
        if not admission.packing:
            raise Refusal(
                f"The teacher cannot read packed rows, because {admission.packing_reason}; set --data.packing false."
            )
    if quantize is not None and not has_packed_weights(model):
        head = {name.rpartition(".")[0] for name in view.head_parameter_names()} if task in CLASSIFIES else set()
        quantize_(model, quantize, skip=head, device=device)
    return view, Frozen(model, dtype=compute_dtype(dtype, device))


def _loaded(origin: Origin, task: str, labels: list[str] | None, multi_label: bool, attention: str) -> Any:
    origin.check_head(task)
    if origin.kind == "checkpoint":
        module = load(origin.name, attention=None if attention == "auto" else attention)
        if module.task != task:
            raise Refusal(
                f"The teacher {origin.name} was trained for the task {module.task}, and the student's is {task}; take a teacher of "
                "the same task."
            )
        return module.view
    settings: dict[str, Any] = {"trust_remote_code": origin.trust_remote_code, "revision": origin.revision}
    # An adapter brings the head of its classes; a base has it.
    named = labels if origin.kind == "adapter" and task in CLASSIFIES and task != "regression" else None
    model, _, new = load_for_task(
        task, origin.base, labels=named, multi_label=multi_label, attention=attention, **settings
    )
    stored: tuple[str, ...] = ()
    if origin.kind == "adapter":
        load_peft_(model, origin.name, adapter_name="teacher")
        stored = read_peft(origin.name, adapter_name="teacher")[0].modules_to_save
    random = sorted(n for n in new if "pooler" not in n and not any(matches(_owner(n), end) for end in stored))
    if random:
        raise Refusal(
            f"The teacher {origin.name} has no trained head for {task} ({random[0]} would be random); train it first, and give its "
            "checkpoint or its merged folder."
        )
    return view_of(model, task)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def view_of(model: Any, task: str) -> Any:
    """The model as its parts: a `CausalLM`, `Seq2SeqLM` or `Classifier`."""
    if task in CLASSIFIES:
        return Classifier(model, task)
    return Seq2SeqLM(model) if task == "seq2seq_lm" else CausalLM(model)


def run(view: Any, batch: Batch) -> Tensor:
    """The pass that training makes: hidden states of a language model, logits of a classifier."""
    layout: dict[str, Any] = {"bounds": batch.bounds, "mask": batch.mask}
    found: Tensor
    if isinstance(view, Seq2SeqLM):
        assert batch.source is not None, "the data module gives rows without a source"
        found = view.hidden(batch.source.ids, batch.source.mask, batch.ids, batch.mask)
    elif isinstance(view, CausalLM):
        found = view.hidden(batch.ids, batch.positions, shared=batch.shared, **layout)
    elif view.task == "token_classification":
        found = view.token_logits(batch.ids, batch.positions, batch.scored, types=batch.types, **layout)
    else:
        found = view.row_logits(batch.ids, batch.positions, types=batch.types, shared=batch.shared, **layout)
    return found


class Teacher:
    """What a teacher says, whoever it is.

    Attributes:
        observer: of its view.
        computing: what puts its weights in place for a while.
    """

    def __init__(
        self,
        observer: Observer,
        computing: Callable[[], AbstractContextManager[Any]],
        head: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Sets it up.

        Args:
            observer: of its view, attached.
            computing: what puts its weights in place for a while.
            head: the same for its output layer alone; None: ``computing``.
        """
        self.observer = observer
        self.computing = computing
        self._head = head or computing

    @torch.no_grad()
    def see(self, batch: Batch) -> Seen:
        """What it computes of a batch."""
        with self.computing(), self.observer.seeing() as seen:
            run(self.observer.view, batch)
        return seen

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) of its hidden states (n, D)."""
        with self._head():
            found: Tensor = self.observer.view.logits(hidden)
        return found

    def at_scored(self, said: Seen, batch: Batch, size: int | None) -> Callable[[slice], Tensor]:
        """Gives its logits of a slice of a batch's scored tokens, of the first ``size`` tokens of its vocabulary."""
        assert said.result is not None
        chosen = said.result.reshape(-1, said.result.shape[-1])[batch.scored]  # (N, D)
        return lambda rows: self.logits(chosen[rows])[..., :size]

    @property
    def vocabulary(self) -> int:
        """How many tokens its output layer has."""
        return vocabulary_of(self.observer.view)


def vocabulary_of(view: Any) -> int:
    """How many tokens a language model's output layer has."""
    return int(view.config.vocab_size)


def self_teacher(observer: Observer, attachment: Attachment) -> Teacher:
    """The model as it was when the fit began, seen by an observer of itself.

    Its output layer needs its earlier weights only where it is trained.
    """
    view = observer.view

    @contextmanager
    def earlier() -> Iterator[None]:
        with attachment.reference(), evaluating(view.model):
            yield

    def head() -> AbstractContextManager[Any]:
        return earlier() if any(p.requires_grad for p in view.head_parameters()) else nullcontext()

    return Teacher(observer, earlier, None if isinstance(view, Classifier) else head)


def fingerprint_of(module: nn.Module) -> str:
    """By which a run that resumes knows its teacher, also on a device where ``dtype: auto`` is another."""
    return digest(module, {}, rounded=True)


__all__ = [
    "SELF",
    "Origin",
    "Teacher",
    "fingerprint_of",
    "load_teacher",
    "origin_of",
    "run",
    "self_teacher",
    "view_of",
    "vocabulary_of",
]
