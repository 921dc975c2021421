"""Which parts of a model train from when: phases made from its blocks or read from a file, as pure functions.

A phase opens once the run has reached its epoch or optimizer step and stays open, so what trains depends on (step, epoch)
alone and a resumed run finds it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from lightning_ft.engine.freezing import parameters_named
from lightning_ft.engine.model_parts import WORDS, Block, blocks_in, head_names, pristine_parameters, stacks
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.select import LayerSpec

Unit = Literal["step", "epoch"]
_KEYS = ("at", "unit", "train")


@dataclass(frozen=True)
class Phase:
    """What trains once the run has reached ``at``.

    Attributes:
        at: epoch or optimizer step, counted from 0.
        unit: which of the two.
        train: names, as `lightning_ft.engine.freezing.parameters_named` takes them.
    """

    at: int
    unit: Unit
    train: tuple[str, ...]

    def is_open(self, step: int, epoch: int) -> bool:
        """Whether it has been reached when ``step`` optimizer steps and ``epoch`` epochs are done."""
        return (step if self.unit == "step" else epoch) >= self.at


def thawing_order(
    model: nn.Module, *, groups: int = 1, layers: LayerSpec | None = None, embeddings: bool = True, head: bool = True
) -> list[list[str]]:
    """Names of a model's parts in the order in which they thaw: the head, its blocks from the top, what lies below them.

    What lies outside the blocks and behind them (a last norm, a pooler) goes with the first blocks, what lies before them
    (an embedding's norm, a stem) with the embeddings. An encoder-decoder thaws a block of each stack at a time.

    Args:
        model: any module; names are pristine and mean exactly what they say.
        groups: how many blocks of a stack thaw at a time.
        layers: only these blocks ever thaw; None is all of them.
        embeddings: whether what lies below the blocks thaws at all.
        head: whether the head is a part of its own; False for a model without one.

    Raises:
        Refusal: when the model repeats no blocks, or has no head.
    """
    parameters = pristine_parameters(model)
    names = list(parameters)
    top = head_names(model) if head else []
    allowed = blocks_in(model, layers) if layers is not None else None
    piles = [[b for b in stack if not set(b.parameters) <= set(top)] for stack in stacks(model)]
    piles = [pile for pile in piles if pile]
    if not piles:
        raise Refusal(
            f"{type(model).__name__} has no numbered blocks to thaw one after the other; write a schedule that names its parts."
        )
    inside = {name for pile in piles for block in pile for name in block.parameters}
    first = min(names.index(name) for name in inside)
    low = set(WORDS["embeddings"](model)) if _has(model, "embeddings") else set()
    low |= set(names[:first])
    below = [name for name in names if name in low - inside - set(top)]
    behind = [name for name in names if name not in low | inside | set(top)]
    waiting = [[b for b in pile if allowed is None or b.name in allowed] for pile in piles]
    steps: list[list[str]] = []
    while any(waiting):
        taken: list[Block] = [block for pile in waiting for block in pile[-groups:]]
        waiting = [pile[:-groups] for pile in waiting]
        steps.append([name for block in taken for name in block.parameters])
    if steps:
        steps[0] = [*steps[0], *behind]
    order = []
    thawed: set[int] = set()
    for part in (top, *steps, below if embeddings else []):
        tensors = {id(parameters[name]) for name in part}
        if not tensors <= thawed:  # an embedding tied to the head thaws with the head
            order.append(shortest_names(model, part))
        thawed |= tensors
    return order


def gradual_phases(
    model: nn.Module,
    *,
    every: int,
    unit: Unit,
    start: Sequence[str] = (),
    groups: int = 1,
    layers: LayerSpec | None = None,
    embeddings: bool = True,
) -> list[Phase]:
    """The head and ``start`` at 0, then one part of `thawing_order` at ``every``, at twice ``every``, and so on.

    A backbone without a head begins with ``start`` alone; what trains beside it (a head of the user's own module, LoRA) is
    not named here.
    """
    with_head = _has(model, "head")
    order = thawing_order(model, groups=groups, layers=layers, embeddings=embeddings, head=with_head)
    first = [*(order.pop(0) if with_head else []), *start]
    phases = [Phase(number * every, unit, tuple(part)) for number, part in enumerate(order, start=1)]
    return [Phase(0, unit, tuple(first)), *phases] if first else phases


def shortest_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The fewest names of modules (or parameters) that mean exactly these parameters, in the model's order.

    A tensor with several names, of which all are wanted, is named once.
    """
    wanted, found, parameters = set(names), [], pristine_parameters(model)
    below: dict[str, list[str]] = {}
    for full in parameters:
        parts = full.split(".")
        for end in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:end]), []).append(full)
    covered: set[int] = set()
    for full, tensor in parameters.items():
        if full not in wanted or id(tensor) in covered:
            continue
        parts = full.split(".")
        whole = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        name = next(prefix for prefix in whole if set(below[prefix]) <= wanted)
        covered |= {id(parameters[inside]) for inside in below[name]}
        found.append(name if _means(model, name, below[name]) else rf"re:{re.escape(name)}(\..*)?")
    return found


def depth_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate for each parameter: ``decay`` to the power of its distance from the head.

    eta(d) = eta * decay^d: 1 for the head and what lies behind the blocks, decay^1 for the last block, decay^L for the
    first of L, decay^(L + 1) for what lies before them. Howard and Ruder (2018, section 3.2) take decay = 1 / 2.6.

    Args:
        model: any module with numbered blocks; each stack of an encoder-decoder counts by itself.
        decay: above 0; 1 leaves all rates alone.

    Returns:
        pristine name -> factor; a tied parameter has that of the place nearest to the head.
    """
    head = set(head_names(model)) if _has(model, "head") else set()
    low = set(WORDS["embeddings"](model)) if _has(model, "embeddings") else set()
    piles = stacks(model)
    names = list(pristine_parameters(model))
    inside = [name for pile in piles for block in pile for name in block.parameters]
    if inside:
        low |= set(names[: min(names.index(name) for name in inside)])
    factors = dict.fromkeys(names, 1.0)
    deepest = max((len(pile) for pile in piles), default=0)
    factors |= {name: decay ** (deepest + 1) for name in names if name in low - head}
    for pile in piles:
        for above, block in enumerate(reversed(pile)):
            factors |= {name: decay ** (above + 1) for name in block.parameters if name not in head}
    return factors


def read_schedule(given: str | Path | Sequence[Mapping[str, Any]], *, unit: Unit = "epoch") -> list[Phase]:
    """The phases of a file, or of the list that such a file holds.

    Args:
        given: a YAML file or its content: ``[{at: 0, unit: epoch, train: [lm_head]}, ...]``, ``at`` ascending.
        unit: of entries that do not say it.

    Raises:
        Refusal: one sentence on the first thing that is wrong, with the number of its entry.
    """
    where = f"The schedule {given}" if isinstance(given, (str, Path)) else "The schedule"
    entries: Any = _load(Path(given).expanduser()) if isinstance(given, (str, Path)) else given
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise Refusal(f"{where} must be a list of entries with at and train, got {_short(entries)}.")
    phases: list[Phase] = []
    for number, entry in enumerate(entries, start=1):
        phases.append(_phase(entry, f"{where}, entry {number},", unit))
        if phases[-1].unit != phases[0].unit:
            raise Refusal(
                f"{where}, entry {number}, counts in {phases[-1].unit}s, the first in {phases[0].unit}s; use one."
            )
        if number > 1 and phases[-1].at <= phases[-2].at:
            raise Refusal(
                f"{where}, entry {number}, is at {phases[-1].at}, not after the entry before it, which is at {phases[-2].at}; "
                "order the entries, and join those of one time."
            )
    return phases


def entries_of(phases: Sequence[Phase]) -> list[dict[str, int | str | list[str]]]:
    """Plain types, as a file or a checkpoint holds them."""
    return [{"at": phase.at, "unit": phase.unit, "train": list(phase.train)} for phase in phases]


def write_schedule(phases: Sequence[Phase]) -> str:
    """The text of a file that `read_schedule` reads, with a line that says how."""
    head = "# What starts to train when; what no entry names stays frozen. Edit it, then: --unfreezing.schedule THIS_FILE\n"
    return head + yaml.safe_dump(entries_of(phases), sort_keys=False, width=120, allow_unicode=True)


def _phase(entry: Any, where: str, unit: Unit) -> Phase:
    if not isinstance(entry, Mapping):
        raise Refusal(f"{where} must be a mapping with at and train, got {_short(entry)}.")
    unknown = [str(key) for key in entry if key not in _KEYS]
    if unknown:
        raise Refusal(f"{where} has an unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}.")
    missing = [key for key in ("at", "train") if key not in entry]
    if missing:
        raise Refusal(f"{where} lacks {missing[0]}; it needs at and train.")
    at, train, counted = entry["at"], entry["train"], entry.get("unit", unit)
    if isinstance(at, bool) or not isinstance(at, int) or at < 0:
        raise Refusal(f"{where} must be at a whole number, at least 0, got {at!r}.")
    if counted not in ("step", "epoch"):
        raise Refusal(f"{where} has the unit {counted!r}; it is step or epoch.")
    if isinstance(train, str) or not isinstance(train, Sequence) or not train:
        raise Refusal(f"{where} must train a list of names, got {_short(train)}.")
    if wrong := [name for name in train if not isinstance(name, str)]:
        raise Refusal(f"{where} names {wrong[0]!r}, which is no name; put it in quotes.")
    return Phase(at, counted, tuple(train))


def _load(path: Path) -> Any:
    if not path.is_file():
        raise Refusal(
            f"There is no schedule {path}; write one with: lightning-ft schedule --config FILE --output {path}."
        )
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark is not None else ""
        raise Refusal(f"The schedule {path}{line} is not YAML: {getattr(error, 'problem', None) or error}.") from None


def _means(model: nn.Module, name: str, names: Sequence[str]) -> bool:
    """Whether a pattern means these parameters and no other: a short name may also be the end of another one."""
    return set(parameters_named(model, name)) == set(names)


def _has(model: nn.Module, word: str) -> bool:
    try:
        return bool(WORDS[word](model))
    except Refusal:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
