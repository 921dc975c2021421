"""The panel of a run of several tasks with ``--baselines``: what sharing has brought each, beside a model of it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from lightning_ft.cli.baselines import BASELINES, change
from lightning_ft.cli.readable import number
from lightning_ft.cli.report_parts.run_files import RunFiles

_HEAD = ("task", "measure", "together", "alone", "relative improvement", "steps alone")


def beside_baselines(runs: Sequence[RunFiles]) -> str | None:
    """A table for each run that has trained its baselines: a row a task, and the mean."""
    tables = []
    for run in runs:
        file = run.path / BASELINES
        if not file.is_file():
            continue
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            rows = [
                (
                    str(one["task"]),
                    str(one["measure"]),
                    number(one["together"]),
                    number(one["alone"]),
                    change(one["delta"]),
                    str(one["steps"]),
                )
                for one in told["tasks"]
            ]
            rows.append(("mean over tasks", "", "", "", change(told["mean_delta"]), ""))
        except (OSError, ValueError, KeyError, TypeError):
            run.notes.append(f"{BASELINES} cannot be read.")
            continue
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        body = "".join(
            f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
            for row in rows
        )
        title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        tables.append(
            f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    if not tables:
        return None
    said = (
        "Of each measure more is better. Relative improvement is (together - alone) / |alone|, alone a model that was trained on "
        "as many of the task's rows and on no other task; a dash where that is 0."
    )
    return "".join(tables) + f'<p class="note">{said}</p>'


__all__ = ["beside_baselines"]
