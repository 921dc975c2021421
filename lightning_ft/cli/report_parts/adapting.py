"""What meta-learning is about, as charts: loss and accuracy of new tasks over the steps that adapt to them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_ft.cli.report_parts.chart import Line, Point, chart
from lightning_ft.cli.report_parts.run_files import RunFiles

_STEP = re.compile(r"val/step_(\d+)/(\w+?)(_ci95)?$")


def is_of_adapting(name: str) -> bool:
    """Whether a metric belongs here, or is half the width of an interval, and to no curve over a run."""
    return _STEP.fullmatch(name) is not None or name.endswith("_ci95")


def adapting(runs: Sequence[RunFiles]) -> str | None:
    """One chart a quantity: the last validation of each run, its 95 % interval dashed, and of a single run the first one."""
    quantities = sorted({found[2] for run in runs for name in run.metrics if (found := _STEP.fullmatch(name))})
    charts = []
    for quantity in quantities:
        lines: list[Line] = []
        for number, run in enumerate(runs):
            label = quantity if len(runs) == 1 else f"{run.name}: {quantity}"
            last, half = _at(run, quantity, "", -1), dict(_at(run, quantity, "_ci95", -1))
            lines.append(Line(f"{label}, last validation", last, colour=number, smoothed=False))
            for sign, said in ((1, "upper"), (-1, "lower")):
                edge = [(step, value + sign * half[step]) for step, value in last if step in half]
                lines.append(Line(f"{label}, {said} end of 95 %", edge, colour=number, dashed=True, smoothed=False))
            first = _at(run, quantity, "", 0)
            if len(runs) == 1 and first != last:
                lines.append(Line(f"{label}, first validation", first, colour=1, smoothed=False))
        caption = "Query rows of the validation's episodes, before adapting (0) and after so many inner steps."
        charts.append(chart(quantity, lines, x_label="inner steps", caption=caption))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else None


def _at(run: RunFiles, quantity: str, suffix: str, which: int) -> list[Point]:
    """(inner steps, value) of one validation."""
    points = []
    for name, values in run.metrics.items():
        found = _STEP.fullmatch(name)
        if found and found[2] == quantity and (found[3] or "") == suffix and values:
            points.append((float(found[1]), float(values[which][1])))
    return sorted(points)
