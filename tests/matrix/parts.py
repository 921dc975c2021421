"""What trains, and what comes beside it: one declaration a part; a new technique adds its own here and nothing elsewhere.

`tests/matrix/test_registry.py` sees to it that every technique of the package has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ft import (
    AGEM,
    EWC,
    IA3,
    MAS,
    BottleneckAdapter,
    Distillation,
    ExportAdapter,
    Freeze,
    GenerationMetrics,
    GradualUnfreezing,
    LoRA,
    LwF,
    NEFTune,
    OrthogonalLoRA,
    PrefixTuning,
    PromptTuning,
    Replay,
    SampleGenerations,
    SynapticIntelligence,
    WeightEMA,
)
from lightning_ft.engine.technique import Technique
from tests.matrix.subjects import Subject

Recipe = tuple[type[Technique], dict[str, Any]]

NORMS = r"(?i)norm|\bln_"
BIASES = r"\bbias$"
# PEFT has prefixes in the decoder's attention on itself only, where here all attention has one by default.
ALL_ATTENTION = {"t5": "--prefix.parts '[decoder]'"}


@dataclass(frozen=True)
class Part:
    """What is trained.

    Attributes:
        name: in the table and in the key of a cell.
        recipes: the techniques, with small arguments.
        own: which of the base's own parameters have to train beside the head of a new task: a regular expression over
            their names, ``head`` or ``last_block`` as a `Subject` says them, or None for none. It is written here and not
            asked of the library, since it is the oracle.
        unwritten: kind of base -> words of the refusal, where no format of others has a place for an adapter of it.
        unwritten_name: which adapter that is.
        headless: whether its format has no place for the trained head of a classifier.
    """

    name: str
    recipes: tuple[Recipe, ...] = ()
    own: str | None = None
    unwritten: dict[str, str] = field(default_factory=dict)
    unwritten_name: str = ""
    headless: bool = False

    def build(self) -> list[Technique]:
        """Fresh techniques."""
        return [cls(**arguments) for cls, arguments in self.recipes]

    def pattern(self, subject: Subject) -> str | None:
        """`own` as a regular expression over the names of a subject's parameters."""
        return {"head": subject.head, "last_block": subject.last_block}.get(self.own or "", self.own)

    @property
    def injects(self) -> bool:
        """Whether it adds parameters."""
        return any(cls not in (Freeze, GradualUnfreezing) for cls, _ in self.recipes)


PARTS = {
    part.name: part
    for part in (
        Part("full", own=""),
        Part("biases", ((Freeze, {"train": ["biases"]}),), own=BIASES),
        Part("norms", ((Freeze, {"train": ["norms"]}),), own=NORMS),
        Part("head", ((Freeze, {"train": ["head"]}),), own="head"),
        Part("top", ((Freeze, {"top": 0.5}),), own="last_block"),
        Part("gradual", ((GradualUnfreezing, {"unit": "step", "groups": 2}),), own=""),
        Part("lora", ((LoRA, {"r": 2}),)),
        Part("dora", ((LoRA, {"r": 2, "dora": True}),)),
        Part("rslora", ((LoRA, {"r": 4, "rslora": True}),)),
        Part("pissa", ((LoRA, {"r": 2, "init": "pissa"}),)),
        Part("orthogonal-lora", ((OrthogonalLoRA, {"r": 2}),)),
        Part("adapter-houlsby", ((BottleneckAdapter, {"style": "houlsby", "reduction_factor": 8}),), headless=True),
        Part("adapter-pfeiffer", ((BottleneckAdapter, {"style": "pfeiffer", "reduction_factor": 8}),), headless=True),
        Part(
            "adapter-parallel",
            ((BottleneckAdapter, {"style": "parallel", "reduction_factor": 8, "scale": 4.0}),),
            headless=True,
        ),
        Part("prefix", ((PrefixTuning, {"tokens": 3}),), unwritten=ALL_ATTENTION, unwritten_name="prefix"),
        Part("prompt", ((PromptTuning, {"tokens": 3}),)),
        Part("prompt-network", ((PromptTuning, {"tokens": 3, "network": 4}),)),
        Part("ia3", ((IA3, {}),)),
        Part("lora+norms", ((LoRA, {"r": 2}), (Freeze, {"train": ["norms"]})), own=NORMS),
        Part(
            "lora+prefix",
            ((LoRA, {"r": 2}), (PrefixTuning, {"tokens": 3})),
            unwritten=ALL_ATTENTION,
            unwritten_name="prefix",
        ),
        Part("lora+adapter", ((LoRA, {"r": 2}), (BottleneckAdapter, {"reduction_factor": 8}))),
        Part("ia3+prompt", ((IA3, {}), (PromptTuning, {"tokens": 3}))),
    )
}


@dataclass(frozen=True)
class Extra:
    """What comes beside a trained part.

    Attributes:
        name: in the table and in the key of a cell.
        recipe: the technique, with small arguments.
        written: a file that the run has to leave in its folder.
        logged: a metric that it has to log.
        alike: whether the trained weights are those of a run without it.
        packs: whether it is tried with packed rows as well.
    """

    name: str
    recipe: Recipe
    written: str | None = None
    logged: str | None = None
    alike: bool = True
    packs: bool = False

    def build(self, subject: Subject, ground: Path) -> list[Technique]:
        """A fresh technique; one that teaches a task of several by name has the subject's base as teacher.

        Args:
            subject: beside which it stands.
            ground: folder of the bases.
        """
        cls, arguments = self.recipe
        taught = (
            {"teacher": str(ground / subject.base), "name": subject.taught}
            if cls is Distillation and subject.taught
            else {}
        )
        return [cls(**arguments, **taught)]


EXTRAS = {
    extra.name: extra
    for extra in (
        Extra("neftune", (NEFTune, {"alpha": 5.0}), alike=False),
        Extra("agem", (AGEM, {"size": 4}), alike=False),
        Extra("lwf", (LwF, {})),
        Extra("replay", (Replay, {"size": 4}), alike=False, packs=True),
        Extra("ewc", (EWC, {"lam": 1.0, "importance": "uniform"}), alike=False),
        Extra("fisher", (EWC, {"lam": 1.0}), packs=True),
        Extra("mas", (MAS, {"lam": 1.0})),
        Extra("si", (SynapticIntelligence, {"lam": 1.0})),
        Extra("distillation", (Distillation, {"soft_targets": 0.5}), alike=False),
        Extra("ema", (WeightEMA, {"decay": 0.5, "warmup": False}), alike=False),
        Extra("export", (ExportAdapter, {}), written="adapter/adapter_config.json"),
        Extra("samples", (SampleGenerations, {"prompts": ["hello"], "max_new_tokens": 2}), written="samples.jsonl"),
        Extra("generation", (GenerationMetrics, {"rows": 2, "max_new_tokens": 2}), logged="val/exact_match"),
    )
}
EXTRA_PARTS = ("full", "lora", "prefix", "adapter-pfeiffer")
"""The parts that each extra is tried beside."""

#: Techniques that are in no cell yet, and why; one that has a part or is an extra may not stand here.
NOT_YET = {
    "GradientSurgery": "it needs several terms; tests/callbacks/test_gradient_surgery and tests/modules/test_multitask",
    "LossBalancing": "it needs several terms; tests/callbacks/test_loss_balancing",
    "TaskSampling": "it needs MultiTaskData; tests/callbacks/test_task_sampling",
}

__all__ = ["EXTRAS", "EXTRA_PARTS", "NOT_YET", "PARTS", "Extra", "Part", "Recipe"]
