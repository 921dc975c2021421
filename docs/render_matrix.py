"""Writes docs/guides/matrix.md from the outcomes that `make matrix` has kept in tests/matrix/results.jsonl.

python docs/render_matrix.py
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the cells are those of the tests

from tests.matrix import results  # noqa: E402
from tests.matrix.cells import AXES, Cell, cells  # noqa: E402
from tests.matrix.parts import EXTRAS, PARTS  # noqa: E402
from tests.matrix.placements import PLACEMENTS  # noqa: E402
from tests.matrix.subjects import SUBJECTS  # noqa: E402

PAGE = ROOT / "docs" / "guides" / "matrix.md"
HEAD = """# What was tried with what

Every trained part with every task, on one device, under DDP and FSDP2 on two, and over a base packed in 4 bits (nf4), with and
without activation checkpointing and packed rows: models of two layers on a CPU. A cell that works has trained, saved a checkpoint
of what is trained and nothing else, said the same after `lightning_ft.load`, resumed after its second step to the third step of the
unbroken run (on one device bit for bit), ended with the weights of one process with padded rows, left frozen weights as they were,
and given equal logits where it was exported to. A cell that cannot work was refused before the first step, in the words of
[the rules](compatibility.md). The cells are generated from the rules ([tests/matrix](../../tests/matrix)), and `make matrix` runs
those whose outcome is not known for the present code.
"""


def main() -> None:
    """Brings the page up to date."""
    results.tidy()
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page."""
    found = results.latest()
    rows = [(cell, found[cell.key]) for cell in cells() if cell.key in found]
    counts = Counter(row["outcome"] for _, row in rows)
    versions = ", ".join(f"{version} ({n})" for version, n in Counter(row["version"] for _, row in rows).most_common())
    return "\n".join(
        [
            HEAD,
            f"Of {len(cells())} cells {len(rows)} were run: {counts['works']} work, {counts['refused']} are refused, "
            f"{counts['failed'] + counts['known']} fail; "
            f"{sum(row['seconds'] for _, row in rows) / 60:.0f} minutes of runs, by version of the code: {versions or 'none'}.",
            "",
            "## Parts and placements",
            "",
            "Cells that work, and after a stroke those that are refused; tasks, checkpointing and packing are counted together.",
            "",
            _grid(rows, list(PARTS), "part", lambda cell: cell.extra is None),
            "## Parts and tasks",
            "",
            _grid(rows, list(PARTS), "part", lambda cell: cell.extra is None, across="subject", columns=list(SUBJECTS)),
            "## Beside a trained part",
            "",
            _grid(rows, list(EXTRAS), "extra", lambda cell: cell.extra is not None),
            "## What others read",
            "",
            "Where the trained part went, and gave equal logits: `PEFT` and `merged` (a plain Hugging Face folder) in those",
            "libraries, `AdapterHub` (its library does not run beside this transformers) in our reader, `checkpoint` nowhere but",
            "here.",
            "",
            _formats(rows),
            "## Why cells are refused",
            "",
            _reasons(rows, ("refused",)),
            *(
                ["## What fails today", "", _reasons(rows, ("failed", "known"))]
                if counts["failed"] + counts["known"]
                else []
            ),
        ]
    )


def _grid(
    rows: Iterable[Any], names: list[str], axis: str, wanted: Any, *, across: str = "placement", columns: Any = None
) -> str:
    columns = columns or list(PLACEMENTS)
    counts: Counter[tuple[str, str, str]] = Counter(
        (getattr(cell, axis), getattr(cell, across), row["outcome"]) for cell, row in rows if wanted(cell)
    )

    def entry(name: str, column: str) -> str:
        works, refused = counts[name, column, "works"], counts[name, column, "refused"]
        return (f"{works} / {refused}" if refused else str(works)) if works or refused else "-"

    return _table((axis, *columns), [(name, *(entry(name, column) for column in columns)) for name in names])


def _formats(rows: Iterable[Any]) -> str:
    formats: dict[str, Counter[str]] = {}
    for cell, row in rows:
        if row["outcome"] == "works" and cell.extra is None:
            formats.setdefault(cell.part, Counter())[row["detail"]] += 1
    shown = {part: ", ".join(f"{name} ({n})" for name, n in counted.most_common()) for part, counted in formats.items()}
    return _table(("part", "formats"), [(part, shown[part]) for part in PARTS if part in shown])


def _reasons(rows: Iterable[Any], outcomes: tuple[str, ...]) -> str:
    cells_of: dict[str, list[Cell]] = {}
    for cell, row in rows:
        if row["outcome"] in outcomes:
            cells_of.setdefault(row["detail"], []).append(cell)
    ordered = sorted(cells_of.items(), key=lambda item: (-len(item[1]), item[0]))
    return _table(("cells", "where", "words"), [(str(len(found)), _where(found), words) for words, found in ordered])


def _where(found: list[Cell]) -> str:
    """The axes on which the cells of one reason are few values of many."""
    said = []
    for axis in AXES:
        values = list(dict.fromkeys(str(getattr(cell, axis)) for cell in found))
        every = {str(getattr(cell, axis)) for cell in cells()}
        if len(values) <= max(1, len(every) // 2) and values not in (["None"], ["False"]):
            said.append(", ".join(axis if value == "True" else value for value in values if value != "None"))
    return "; ".join(said) or "everywhere"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join("| " + " | ".join(entry.replace("|", "\\|") for entry in line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
