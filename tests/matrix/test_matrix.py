"""Every combination that the rules allow trains, saves, loads, resumes and leaves; every other is refused in their words.

``make test`` runs a sample that has each value of each axis, ``make matrix`` all cells whose outcome is not yet known
for this version of the code.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import jobs, results
from tests.matrix.cells import Cell, refusals
from tests.matrix.checks import check
from tests.matrix.known import reason_of
from tests.matrix.sample import chosen
from tests.matrix.subjects import write_ground
from tests.two_ranks import TwoRanks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*already exists and is not empty"),
]


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and rows."""
    return write_ground(tmp_path_factory.mktemp("matrix"))


def parameters(ranks: int) -> list[Any]:
    found = []
    for cell in chosen():
        if cell.ranks == ranks:
            reason = reason_of(cell)
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            found.append(pytest.param(cell, id=cell.key, marks=marks))
    return found


@pytest.mark.parametrize("cell", parameters(1))
def test_one_process(cell: Cell, ground: Path, tmp_path: Path) -> None:
    try_cell(cell, ground, tmp_path, lambda **job: [jobs.run(**job)])


@pytest.mark.parametrize("cell", parameters(2))
def test_two_processes(cell: Cell, ground: Path, tmp_path: Path, two_ranks: TwoRanks) -> None:
    try_cell(cell, ground, tmp_path, lambda **job: two_ranks.run("tests.matrix.jobs:run", **job))


def try_cell(cell: Cell, ground: Path, folder: Path, run: Any) -> None:
    """Runs a cell, compares it with what the rules say, and notes the outcome."""
    if reason := results.over():
        pytest.skip(reason)
    began = time.monotonic()
    try:
        outcome, detail = outcome_of(cell, ground, folder, run)
    except Exception as error:
        known = reason_of(cell)
        results.note(cell, "known" if known else "failed", known or str(error)[:500], time.monotonic() - began)
        raise
    results.note(cell, outcome, detail, time.monotonic() - began)


def outcome_of(cell: Cell, ground: Path, folder: Path, run: Any) -> tuple[str, str]:
    """``refused`` and the words that the rules have for it, or ``works`` and what it was exported to."""
    expected = refusals(cell)
    ranks = run(**cell.values(), ground=str(ground), folder=str(folder))
    refused = [found["refused"] for found in ranks if "refused" in found]
    if expected:
        assert len(refused) == len(ranks), f"The rules refuse it ({expected[0]}), and it ran."
        for sentence in refused:
            assert any(part in sentence for part in expected), f"It is refused by: {sentence}\nand not by: {expected}"
        assert all(found["steps"] == 0 for found in ranks), "It was refused only after a step."
        return "refused", next(part for part in reversed(expected) if part in refused[0])
    assert not refused, f"No rule refuses it, and it says: {refused[0]}"
    truth = None if cell == cell.plain else plain_weights(cell.plain, ground)
    exported = check(cell, ranks, truth, ground, folder)
    if truth is None:
        keep_weights(cell, ground, ranks[0]["trained"])
    return "works", exported


def plain_weights(cell: Cell, ground: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a plain cell, from an earlier test of this session if there was one."""
    file = _file(cell, ground)
    if not file.exists():
        folder = ground / "plain" / file.stem
        found = jobs.run(**cell.values(), ground=str(ground), folder=str(folder), resume=False)
        assert "refused" not in found, f"The plain cell {cell.key} is refused: {found['refused']}"
        keep_weights(cell, ground, found["trained"])
    return torch.load(file, weights_only=True)


def keep_weights(cell: Cell, ground: Path, trained: dict[str, torch.Tensor]) -> None:
    torch.save(trained, _file(cell, ground))


def _file(cell: Cell, ground: Path) -> Path:
    return ground / (cell.key.replace("/", "_") + ".pt")
