"""Loading a base for a task: a language model, a sequence-to-sequence model, or a body under a head that classifies.

A base model is trained, the head of a new task is not: it is what the file may lack. Its first values come from the
seed and the parameter's name, drawn the way the architecture draws them, so that they are the same on every rank and in
every process that loads the same base. Anything else that the file lacks is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ft.formats.heads import kind_of
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.backbone import find_backbone
from lightning_ft.models.load import (
    architecture_of,
    attention_for,
    hub_settings,
    load_causal,
    load_tokenizer,
    open_base,
    read_weights,
    refuse_missing,
)
from lightning_ft.nn.seeding import seeded_generator
from lightning_ft.nn.select import NEW

Task = Literal["causal_lm", "seq2seq_lm", "sequence_classification", "token_classification", "regression"]

TASKS: tuple[Task, ...] = (
    "causal_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "regression",
)

#: The end of the class that transformers has for a task.
_HEADS = {
    "sequence_classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "seq2seq_lm": "ForConditionalGeneration",
}


def load_for_task(
    task: str,
    base: str,
    *,
    labels: Sequence[str] | None = None,
    multi_label: bool = False,
    dtype_policy: str = "auto",
    attention: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[Any, Any, frozenset[str]]:
    """A model with the head of a task, in the dtype of its file, on the CPU, in eval mode, and its tokenizer.

    Args:
        task: causal_lm, seq2seq_lm, sequence_classification, token_classification or regression.
        base: ``starter:NAME``, a folder, or a hub id.
        labels: names of the classes in the order of their numbers; they go into the model's configuration. None keeps
            those of a head that the base was trained with.
        multi_label: sequence_classification: a row may have several classes or none.
        dtype_policy: only checked here, as by ``load_causal``.
        attention: "auto" takes ours where rows may be packed and the architecture lets it, else transformers' default.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model: a branch, tag or commit.
        seed: of the head's first values.

    Returns:
        The transformers model, its tokenizer, and the names of the parameters that the file does not give: a new head,
        one that was replaced because it was trained for other classes, and a pooler that the base never had.

    Raises:
        Refusal: nothing is there, the base is of another kind than the task needs, labels are missing or make no sense,
            or weights of anything but the head are missing from the file.
    """
    if task not in TASKS:
        raise Refusal(f"task '{task}' is not known; choose one of {', '.join(TASKS)}.")
    _check_labels(task, labels, multi_label)
    if task == "causal_lm":
        model, tokenizer = load_causal(
            base,
            dtype_policy=dtype_policy,
            attention=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        return model, tokenizer, frozenset()
    source, config = open_base(base, dtype_policy, attention, trust_remote_code, revision)
    if (problem := why_not(task, config)) is not None:
        raise Refusal(f"'{base}' {problem}.")
    auto_class, mapping = _classes(task)
    settings = hub_settings(source, trust_remote_code, revision)
    if task == "seq2seq_lm":
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
        # Rows of this task are never packed, so that transformers' own attention is as good.
        model, info = read_weights(auto_class, source, None if attention == "auto" else attention, **settings)
        refuse_missing(base, model, info["missing_keys"])
        return model, tokenizer, frozenset()

    trained = has_head(task, config)
    before = _names(config)
    _set_labels(base, config, task, labels, multi_label, trained)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
    implementation = attention_for(config, attention, mapping)
    # Transformers draws for what is missing, and prints a table of it: neither is kept.
    with torch.random.fork_rng(devices=[]), _without_report():
        model, info = read_weights(
            auto_class, source, implementation, config=config, ignore_mismatched_sizes=True, **settings
        )
    model.eval()
    new = {name for name in info["missing_keys"]} | {entry[0] for entry in info["mismatched_keys"]}
    outside = head_names(model)
    refuse_missing(base, model, {name for name in new if name not in outside and not _in_pooler(name)})
    if not trained:
        new |= outside  # a head of another task may have the same names, and even the same shapes
    elif labels is not None and not _continues(before, labels):
        new |= _last_layer(model, outside, len(labels))
    initialise(model, new, seed)
    return model, tokenizer, frozenset(new)


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing weights: that a head is new is no fault, and anything else is refused."""
    logger = logging.getLogger("transformers.modeling_utils")

    def wrong(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(
        wrong
    )  # a level of its own would make transformers report layers that no tensor parallelism splits
    try:
        yield
    finally:
        logger.removeFilter(wrong)


def why_not(task: str, config: Any) -> str | None:
    """Why a base cannot be taken for a task other than causal_lm, and which task fits it; None if it can."""
    architecture, kind = architecture_of(config), kind_of(config)
    if task == "seq2seq_lm":
        if kind == "encoder":
            return (
                f"is an encoder ({architecture}), which writes no text; use the task sequence_classification, "
                "token_classification or regression"
            )
        if kind == "decoder":
            return f"is a decoder ({architecture}), which reads and writes in one row; use the task causal_lm"
    elif kind == "encoder-decoder":
        return (
            f"is a sequence-to-sequence model ({architecture}), which answers in text; use the task seq2seq_lm with "
            "the class as the answer, or an encoder or a decoder"
        )
    auto_class, mapping = _classes(task)
    known = mapping.get(type(config), None) is not None
    if not known and auto_class.__name__ not in (getattr(config, "auto_map", None) or {}):
        return f"is {architecture} of the kind '{config.model_type}', for which transformers has no {_HEADS[task][3:]}"
    return None


def has_head(task: str, config: Any) -> bool:
    """Whether a model's file holds the head of a task, by the class that wrote it."""
    return architecture_of(config).endswith(_HEADS[task])


def label_names(config: Any) -> list[str]:
    """The names of a model's classes, in the order of their numbers."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def head_names(model: Any) -> set[str]:
    """Names of the parameters outside the backbone."""
    body = {id(p) for p in find_backbone(model).parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in body}


def _classes(task: str) -> tuple[Any, Mapping[type, Any]]:
    """Transformers' Auto class for a task, and its models by configuration."""
    import transformers as hf

    if task == "seq2seq_lm":
        return hf.AutoModelForSeq2SeqLM, hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if task == "token_classification":
        return hf.AutoModelForTokenClassification, hf.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    return hf.AutoModelForSequenceClassification, hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _check_labels(task: str, labels: Sequence[str] | None, multi_label: bool) -> None:
    classifies = task in ("sequence_classification", "token_classification")
    if multi_label and task != "sequence_classification":
        raise Refusal(f"multi_label belongs to the task sequence_classification, not to {task}; leave it out.")
    if labels is None:
        return
    if not classifies:
        raise Refusal(f"The task {task} has no classes; leave labels out.")
    if isinstance(labels, str) or len(set(labels)) < len(labels):
        raise Refusal(f"labels must be a list of different names, got {labels!r}.")
    if len(labels) < (1 if multi_label else 2):
        raise Refusal(f"labels {list(labels)!r} leave nothing to choose between; give at least two, or use regression.")


def _names(config: Any) -> list[str] | None:
    """The classes that a configuration names, None if they are only numbered."""
    names = label_names(config)
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _continues(before: list[str] | None, labels: Sequence[str]) -> bool:
    """Whether a trained head of as many outputs speaks of these classes; a head without names is taken to do so."""
    return before is None or before == list(labels)


def _set_labels(
    base: str, config: Any, task: str, labels: Sequence[str] | None, multi_label: bool, trained: bool
) -> None:
    """Write the classes and the kind of problem into a configuration that is about to be loaded with."""
    if task == "regression":
        config.num_labels = 1
        config.problem_type = "regression"
        return
    if labels is None:
        if not trained:
            raise Refusal(
                f"'{base}' ({architecture_of(config)}) has no head for {task} yet, so the classes must be named: give "
                "labels, a list of names."
            )
        if config.num_labels < (1 if multi_label else 2):
            raise Refusal(f"The head of '{base}' has one output, which is no choice; use the task regression.")
    else:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    if task == "sequence_classification":
        config.problem_type = "multi_label_classification" if multi_label else "single_label_classification"


def _in_pooler(name: str) -> bool:
    """Whether a parameter of the backbone belongs to a pooler, which bases trained on single tokens do not have."""
    return "pooler" in name.split(".")


def _last_layer(model: Any, names: set[str], outputs: int) -> set[str]:
    """Of the head's parameters, those of the layer whose outputs are the classes."""
    layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and f"{path}.weight" in names
    ]
    return {name for name in names if name.rpartition(".")[0] == layers[-1]} if layers else set(names)


@torch.no_grad()
def initialise(model: Any, names: set[str] | frozenset[str], seed: int) -> None:
    """Give parameters their first values, in place: the architecture's own distribution, from the seed and their names.

    Args:
        model: a transformers model.
        names: names of the parameters; the others of their modules keep their values.
        seed: together with the module's name it decides the values, on every rank and whatever else is new.
    """
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        new = {key: p for key, p in own.items() if (f"{path}.{key}" if path else key) in names}
        if not new:
            continue
        kept = {key: p.detach().clone() for key, p in own.items() if key not in new}
        dtypes = {key: p.dtype for key, p in new.items()}
        for p in new.values():
            # In float32, so that the file's dtype only rounds; NaN shows what the architecture leaves alone.
            p.data = torch.full(p.shape, torch.nan, device=p.device)
        for holder in (module, *own.values()):
            holder.__dict__.pop("_is_hf_initialized", None)  # transformers' mark of what need not be drawn
        setattr(module, NEW, True)
        with torch.random.fork_rng(devices=[p.device for p in new.values() if p.is_cuda][:1]):
            torch.manual_seed(seeded_generator(seed, path).initial_seed())
            model._init_weights(module)
        for key, p in new.items():
            if not bool(p.isfinite().all()):
                p.copy_(_plain(p, seeded_generator(seed, f"{path}.{key}")))
            p.data = p.data.to(dtypes[key])
        for key, value in kept.items():
            own[key].copy_(value)


def _plain(p: Tensor, generator: torch.Generator) -> Tensor:
    """First values where the architecture names none: small random matrices, vectors of zeros."""
    return torch.zeros_like(p) if p.dim() < 2 else torch.randn(p.shape, generator=generator, device="cpu") * 0.02
