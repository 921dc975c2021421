"""What has to hold of a legal cell after its run; each check says in a sentence what does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lightning_ft
from lightning_ft.nn.registry import base_name
from tests.contract.case import require
from tests.matrix.artefacts import exported
from tests.matrix.cells import Cell
from tests.matrix.jobs import STEPS, plain
from tests.matrix.parts import EXTRAS, PARTS
from tests.matrix.placements import PLACEMENTS
from tests.matrix.subjects import SUBJECTS

NEAR = {"rtol": 1e-4, "atol": 2e-5}
FLAT = 1e-7
"""A gradient below it is rounding: a key's bias, for one, moves no attention."""


def check(cell: Cell, ranks: list[dict[str, Any]], truth: dict[str, Tensor] | None, ground: Path, folder: Path) -> str:
    """All checks of a legal cell.

    Args:
        cell: the cell.
        ranks: what each process has seen.
        truth: the trained weights of `Cell.plain`, None for that cell itself.
        ground: bases and rows.
        folder: the run's.

    Returns:
        The formats that it was exported to.
    """
    first = ranks[0]
    require(first["steps"] == STEPS, f"The run made {first['steps']} of {STEPS} steps.")
    for number, found in enumerate(ranks):
        _frozen(found, f"rank {number}")
        _same(found["resumed"], found["trained"], "a run resumed after two steps", exact=cell.ranks == 1)
        _same(found["trained"], first["trained"], f"rank {number} beside rank 0", exact=True)
    _intended(cell, ranks)
    if truth is not None and (cell.extra is None or EXTRAS[cell.extra].alike):
        _same(first["trained"], truth, "one process with padded rows and nothing recomputed", exact=False)
    _untouched(cell, first, ground)
    module = _reloaded(cell, ranks, folder / f"step={STEPS}.ckpt")
    if cell.extra:
        extra = EXTRAS[cell.extra]
        require(
            not extra.written or (folder / extra.written).is_file(), f"{extra.name} has written no {extra.written}."
        )
        require(not extra.logged or extra.logged in first["logged"], f"{extra.name} has logged only {first['logged']}.")
    return exported(cell, module, ground, folder)


def _frozen(found: dict[str, Any], where: str) -> None:
    changed = sorted(set(found["frozen"]) & set(found["moved"]))
    require(not changed, f"On {where} the frozen {changed} changed.")


def _intended(cell: Cell, ranks: list[dict[str, Any]]) -> None:
    """What trains is what the part means, and all of it moves."""
    part, subject, first = PARTS[cell.part], SUBJECTS[cell.subject], ranks[0]
    injected = set(first["injected"]) - set(first["frozen"])  # a start that is kept beside what trains stays as it is
    require(bool(injected) == part.injects, f"{cell.part} injected {sorted(injected) or 'nothing'}.")
    patterns = [part.pattern(subject), subject.own] + ([subject.head] if subject.new_head else [])
    own = (set(first["frozen"]) | set(first["trained"])) - set(first["injected"])
    meant = {n for n in own if any(p is not None and re.search(p, base_name(n)) for p in patterns)}
    if subject.unused is not None:
        meant = {name for name in meant if not re.search(subject.unused, name)}
    trained = set(first["trained"])
    surplus, missing = sorted(trained - meant - injected), sorted((meant | injected) - trained)
    require(not surplus and not missing, f"{surplus} train and should not; {missing} should and do not.")
    moved = {name for found in ranks for name in found["moved"]}
    slope = {name: max(found["slope"].get(name, 0.0) for found in ranks) for name in trained}
    still = sorted(name for name in trained - moved if slope[name] > FLAT or name not in first["slope"])
    require(not still, f"{still} train and did not move.")


def _untouched(cell: Cell, found: dict[str, Any], ground: Path) -> None:
    """Frozen weights are, bit for bit, those of the base's own file."""
    if PLACEMENTS[cell.placement].quantised:
        return
    stored = load_file(ground / SUBJECTS[cell.subject].base / "model.safetensors")
    names = {_short(name): name for name in stored}
    same = [name for name in found["frozen"] if _short(base_name(name)) in names]
    unused = SUBJECTS[cell.subject].unused  # made anew by whoever loads the base
    asked = [name for name in found["frozen"] if unused is None or not re.search(unused, name)]
    require(not asked or same, f"None of {found['frozen'][:3]} is in the base's file {sorted(names)[:3]}.")
    for name in same:
        theirs = stored[names[_short(base_name(name))]]
        require(torch.equal(found["values"][name], theirs), f"The frozen {name} is not the base's.")


def _short(name: str) -> str:
    """Without the part of the name that differs between a body and a model with a head."""
    return re.sub(r"^(model|transformer|bert)\.", "", re.sub(r"^model\.", "", name))


def _same(found: dict[str, Tensor], truth: dict[str, Tensor], where: str, *, exact: bool) -> None:
    require(found.keys() == truth.keys(), f"What trains differs from {where}: {sorted(found.keys() ^ truth.keys())}.")
    for name, value in truth.items():
        if exact:
            require(torch.equal(found[name], value), f"{name} is not, bit for bit, that of {where}.")
        else:
            torch.testing.assert_close(
                found[name], value, **NEAR, msg=lambda text, name=name: f"{name} is not that of {where}: {text}"
            )


def _reloaded(cell: Cell, ranks: list[dict[str, Any]], file: Path) -> Any:
    """The checkpoint holds what trained and nothing frozen, and the module made of it says what the trained one said."""
    held = set(torch.load(file, weights_only=True)["state_dict"])
    first = ranks[0]
    base = set(first["frozen"]) - set(first["injected"])
    frozen, missing = sorted(held & base), sorted(set(first["trained"]) - held)
    require(not frozen and not missing, f"The checkpoint holds the frozen {frozen} and lacks {missing}.")
    module = lightning_ft.load(file)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    surplus = sorted((held & parameters) - set(first["trained"]) - set(first["injected"]))
    require(not surplus, f"The checkpoint holds {surplus} beside what trained.")
    for number, found in enumerate(ranks):
        with torch.no_grad():
            said = plain(SUBJECTS[cell.subject].says(module, found["batch"]))
        for name, value in found["said"].items():
            if not isinstance(value, Tensor):  # the task's name
                require(said[name] == value, f"Reloaded, {name} of rank {number}'s rows is {said[name]}, not {value}.")
                continue
            torch.testing.assert_close(
                said[name], value, **NEAR, msg=lambda text, number=number: f"Reloaded, rank {number}'s rows: {text}"
            )
    return module
