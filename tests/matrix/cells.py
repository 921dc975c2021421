"""The cells of the matrix, and what the rules say of each: nothing here names what works."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ft import GradualUnfreezing, MultiTask
from lightning_ft.engine import compatibility
from lightning_ft.engine.freezing import parameters_named
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.load_task import load_for_task
from lightning_ft.models.quantize import quantize_
from tests.contract.subjects import QUIET
from tests.matrix.parts import EXTRA_PARTS, EXTRAS, PARTS
from tests.matrix.placements import PLACEMENTS
from tests.matrix.subjects import SUBJECTS, write_base

AXES = ("part", "subject", "placement", "checkpointing", "packing", "extra")


@dataclass(frozen=True)
class Cell:
    """One combination."""

    part: str
    subject: str
    placement: str
    checkpointing: bool = False
    packing: bool = False
    extra: str | None = None

    @property
    def key(self) -> str:
        """As it stands in test names and in the file of results."""
        flags = [name for name in ("checkpointing", "packing") if getattr(self, name)]
        return "/".join([self.part, self.subject, self.placement, *flags, *([self.extra] if self.extra else [])])

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return PLACEMENTS[self.placement].ranks

    @property
    def plain(self) -> Cell:
        """The cell in one process, padded, nothing recomputed: what its trained weights are compared with."""
        quantised = PLACEMENTS[self.placement].quantised
        return Cell(self.part, self.subject, self.placement if quantised else "single", extra=self.extra)

    def values(self) -> dict[str, Any]:
        """Axis -> value."""
        return {axis: getattr(self, axis) for axis in AXES}


@cache
def cells() -> list[Cell]:
    """All of them: the product of the axes, and each extra beside a few parts."""
    found = [
        Cell(part, subject, placement, checkpointing, packing)
        for part, subject, placement in product(PARTS, SUBJECTS, PLACEMENTS)
        for checkpointing, packing in product((False, True), repeat=2)
        if (not packing or SUBJECTS[subject].packs) and (not checkpointing or SUBJECTS[subject].recomputes)
    ]
    found += [
        Cell(part, subject, placement, packing=packing, extra=extra)
        for extra, part, subject, placement in product(EXTRAS, EXTRA_PARTS, SUBJECTS, PLACEMENTS)
        for packing in ((False, True) if EXTRAS[extra].packs and SUBJECTS[subject].packs else (False,))
    ]
    return found


@cache
def refusals(cell: Cell) -> tuple[str, ...]:
    """Every sentence, or telling part of one, that may refuse the cell; empty for a legal one.

    It is read from the compatibility rules, from each technique's traits, and from what the library proves of a base.
    """
    return (*_by_rules(cell), *_by_needs(cell), *_by_base(cell))


def _by_rules(cell: Cell) -> Iterator[str]:
    """The rules and ``traits.cannot``, walked through anew, not by the library's own check."""
    words, techniques = _words(cell.placement, cell.subject), _techniques(cell)
    slots = {technique.traits.slot for technique in techniques}
    for rule in compatibility.RULES:
        touched = [t for t in techniques if not rule.edits or rule.edits & t.traits.edits]
        if rule.words <= words and (touched or not rule.edits):
            yield f"because {rule.why}; {rule.fix}."
    for technique in techniques:
        for cannot in technique.traits.cannot:
            if cannot.meets in words | slots:
                yield f"because {cannot.why}; {cannot.fix}."


def _by_needs(cell: Cell) -> Iterator[str]:
    """What a technique says that it needs, and this module or this part does not have."""
    needs = {need for technique in _techniques(cell) for need in technique.traits.needs}
    silent = getattr(SUBJECTS[cell.subject].module.func, "no_likelihood", None)  # type: ignore[attr-defined]
    if silent and any(getattr(technique, "asks", False) for technique in _techniques(cell)):
        yield "measures what matters by the likelihood of each task"
    if "generator" in needs and not SUBJECTS[cell.subject].generates:
        yield "writes none; leave the callback out."
    several = SUBJECTS[cell.subject].module.func is MultiTask  # type: ignore[attr-defined]
    if several and cell.extra == "generation":
        yield "writes none; leave the callback out."
    if "imitation" in needs and not several and not getattr(SUBJECTS[cell.subject].module.func, "imitates", False):  # type: ignore[attr-defined]
        writes = SUBJECTS[cell.subject].rollouts
        yield f"{'rewards of answers that it writes itself' if writes else 'compares answers with one another'}; distil first"
    if SUBJECTS[cell.subject].rollouts and cell.extra == "neftune":
        yield "because noise in training makes the policy another one than that which wrote the answers; leave it out."
    if cell.extra == "mas" and not hasattr(SUBJECTS[cell.subject].module.func, "likelihood"):  # type: ignore[attr-defined]
        yield "does not say how likely its labels are: give it a method likelihood(batch, ask)"
    if "adapter" in needs:
        part, subject = PARTS[cell.part], SUBJECTS[cell.subject]
        if not part.injects:
            yield "train one, with --lora.r 8 say, or leave the callback out."
        if words := part.unwritten.get(subject.base):
            yield words
        if part.headless and subject.new_head:
            yield "without_head"


def _by_base(cell: Cell) -> Iterator[str]:
    """What the base lacks: parts that a word means, rows that it cannot take, weights that cannot train in few bits."""
    packing_reason = _base(cell.subject)[1]
    if cell.packing and packing_reason:
        yield f"because {packing_reason}; set --data.packing false."
    yield from _lacking(cell.part, cell.subject)
    unused, own = SUBJECTS[cell.subject].unused, _own(cell.part, cell.subject)
    gradual = any(recipe[0] is GradualUnfreezing for recipe in PARTS[cell.part].recipes)  # which begins with the head
    first = _own("head", cell.subject) if gradual else own
    if unused and first and not PARTS[cell.part].injects and all(re.search(unused, name) for name in first):
        yield "Nothing is trainable"
    if PLACEMENTS[cell.placement].quantised and _own(cell.part, cell.subject) & _packed(cell.subject):
        yield "cannot be trained"


@cache
def _lacking(part: str, subject: str) -> tuple[str, ...]:
    """What the library says of a word of `Freeze` that means nothing in the base."""
    said = []
    for _, arguments in PARTS[part].recipes:
        try:
            parameters_named(_base(subject)[0], arguments.get("train") or [])
        except Refusal as refusal:
            said.append(str(refusal))
    return tuple(said)


@cache
def _own(part: str, subject: str) -> set[str]:
    """Which of the base's own parameters the part means."""
    pattern = PARTS[part].pattern(SUBJECTS[subject])
    names = [f"model.{name}" for name, _ in _base(subject)[0].named_parameters()]
    return {name for name in names if pattern is not None and re.search(pattern, name)}


@cache
def _packed(subject: str) -> set[str]:
    """Which of them quantisation packs."""
    return {f"model.{name}.weight" for name in quantize_(copy.deepcopy(_base(subject)[0]), "nf4")}


def _techniques(cell: Cell) -> list[Any]:
    return PARTS[cell.part].build() + (
        EXTRAS[cell.extra].build(SUBJECTS[cell.subject], Path(".")) if cell.extra else []
    )


@cache
def _words(placement: str, subject: str) -> frozenset[str]:
    """The situation as the library reads it off a Trainer of this placement."""
    where = PLACEMENTS[placement]
    module, _ = SUBJECTS[subject].job(Path("."), ranks=where.ranks, packing=False, model=where.model)
    trainer = pl.Trainer(**{**QUIET, **where.trainer_options()})
    return compatibility.situation(trainer, module).words


@cache
def _base(subject: str) -> tuple[Any, str]:
    """(model, why its rows cannot be packed): the tiny base with its head, never trained."""
    chosen = SUBJECTS[subject]
    labels = ["a", "b", "c"] if chosen.task.endswith("_classification") else None
    before = torch.get_rng_state()
    with tempfile.TemporaryDirectory() as folder:
        write_base(chosen.base, Path(folder))
        model, *_ = load_for_task(
            chosen.task, folder, labels=labels, multi_label=False, dtype_policy="float32", attention="auto",
            trust_remote_code=False, revision=None, seed=0,
        )  # fmt: skip
    torch.set_rng_state(before)
    return model, admit_task(model, chosen.task, packing=True).packing_reason


__all__ = ["AXES", "Cell", "cells", "refusals"]
