"""Outcomes of cells as lines of a file in the tree: a run that was stopped goes on, and the docs are rendered from it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lightning_ft
from tests.matrix.cells import Cell

FILE = Path(__file__).parent / "results.jsonl"
WANTED = "MATRIX"
"""The environment's word for how much is run: ``all`` that is not yet known for this version; else a sample."""
MINUTES = "MATRIX_MINUTES"
"""The environment's word for how long cells are begun, from the import of this module on; without it there is no end."""
BEGAN = time.monotonic()


@cache
def version() -> str:
    """The package's version and a digest of its sources, so that a change of any file makes every cell run again."""
    folder = Path(lightning_ft.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return f"{lightning_ft.__version__}+{digest.hexdigest()[:10]}"


def note(cell: Cell, outcome: str, detail: str, seconds: float) -> None:
    """Keeps an outcome; only while the whole matrix is run, so that a sample leaves the tree as it is."""
    if os.environ.get(WANTED) != "all":
        return
    row = {"cell": cell.key, "outcome": outcome, "detail": detail, "seconds": round(seconds, 2), "version": version()}
    with open(FILE, "a", encoding="utf-8") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # several processes write
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


def over() -> str | None:
    """Why no further cell is begun; None while there is time."""
    minutes = float(os.environ.get(MINUTES) or "inf")
    if time.monotonic() - BEGAN < 60 * minutes:
        return None
    return f"{minutes:g} minutes are over; the cells that are left wait for the next call."


def latest() -> dict[str, dict[str, Any]]:
    """Key of a cell -> its last outcome."""
    if not FILE.exists():
        return {}
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return {row["cell"]: row for row in map(json.loads, lines)}


def open_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Those whose outcome is not known for this version, and those that failed."""
    known = {key for key, row in latest().items() if row["version"] == version() and row["outcome"] != "failed"}
    return [cell for cell in cells if cell.key not in known]


def tidy() -> None:
    """Leaves one line a cell, in the order of the matrix; outcomes of cells that are gone are dropped."""
    from tests.matrix.cells import cells

    found = latest()
    rows = [json.dumps(found[cell.key], ensure_ascii=False) + "\n" for cell in cells() if cell.key in found]
    FILE.write_text("".join(rows), encoding="utf-8")
