"""The panel of a run that learned one task after another: the score on each task after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.data.task_scores import MATRIX, read_matrix
from lightning_ft.functional.heat_map import heat_map


def task_matrix(runs: Sequence[RunFiles]) -> str | None:
    """A picture for each run that has written a matrix."""
    pictures = []
    for run in runs:
        file = run.path / MATRIX
        if not file.is_file():
            continue
        try:
            what, rows, columns, values = read_matrix(file)
        except (OSError, ValueError, IndexError):
            run.notes.append(f"{MATRIX} cannot be read.")
            continue
        better = "less is better" not in what
        caption = f"{run.name}: {what}; a row after each task, a column for each."
        picture = heat_map(values, rows, columns, higher_is_better=better, corner="after \\ on")
        pictures.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="charts">{"".join(pictures)}</div>' if pictures else None
