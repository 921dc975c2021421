"""The charts of a report: losses, learning rate, gradient norm, then every other metric, train and val together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_ft.cli.report_parts.adapting import is_of_adapting
from lightning_ft.cli.report_parts.chart import Line, chart
from lightning_ft.cli.report_parts.run_files import RunFiles

SPEED = "tokens_per_second"
FIRST = ("loss", "learning rate", "gradient norm")
TASKS = "continual learning"
CAPTIONS = {
    TASKS: "Over the tasks so far, at the end of each.",
    "loss": "Mean over what is scored, in nats where it is a log-likelihood.",
    "learning rate": "The largest of all parameter groups.",
    "gradient norm": "Before clipping.",
}


def curves(runs: Sequence[RunFiles]) -> str | None:
    """One chart a quantity; several runs lie over one another."""
    grouped: dict[str, list[tuple[RunFiles, int, str]]] = {}
    for number, run in enumerate(runs):
        for name in run.metrics:
            quantity = quantity_of(name, run.metrics)
            if quantity != SPEED and not is_of_adapting(name):
                grouped.setdefault(quantity, []).append((run, number, name))
    if not grouped:
        return '<p class="empty">Nothing was logged yet.</p>'
    ordered = [name for name in FIRST if name in grouped] + sorted(name for name in grouped if name not in FIRST)
    charts = []
    for name in ordered:
        lines = _lines(grouped[name], len(runs), smoothed=name != "learning rate")  # a schedule has no noise
        charts.append(chart(name, lines, caption=CAPTIONS.get(name, "")))
    return f'<div class="charts">{"".join(charts)}</div>'


def speed(runs: Sequence[RunFiles]) -> str | None:
    """Tokens per second while training."""
    found = [
        (run, number, name) for number, run in enumerate(runs) for name in run.metrics if quantity_of(name) == SPEED
    ]
    if not found:
        return None
    caption = "Real tokens of one rank over the time of its training batches, from the run's begin to that step."
    drawn = chart("tokens per second", _lines(found, len(runs), smoothed=False), caption=caption)
    return f'<div class="charts">{drawn}</div>'


def quantity_of(name: str, others: Collection[str] = ()) -> str:
    """What a metric measures, by its name: ``train/loss`` and ``val/loss`` are one chart.

    Names of Lightning's own LearningRateMonitor (``lr-AdamW``) and gradient norms (``grad_2.0_norm_total``) are known too. So
    are the tasks of a stream, which share a chart: ``val/loss/films`` is one where there is a ``val/loss``.

    Args:
        name: of the metric.
        others: names of all metrics of the run.
    """
    if name.startswith("continual/"):
        return TASKS
    whole, _, task = name.rpartition("/")
    if task and "/" in whole and whole in others:
        return f"{quantity_of(whole)} by task"
    prefix, slash, rest = name.partition("/")
    if not slash or prefix not in ("train", "val", "test"):
        rest = name
    rest = rest.removesuffix("_step").removesuffix("_epoch")
    if rest in ("lr", "learning_rate") or rest.startswith("lr-"):
        return "learning rate"
    if rest == "grad_norm" or (rest.startswith("grad_") and "norm" in rest):
        return "gradient norm"
    return rest


def _lines(found: list[tuple[RunFiles, int, str]], runs: int, *, smoothed: bool = True) -> list[Line]:
    """Colours tell metrics apart in one run, and runs apart in several, where val is dashed."""
    lines = []
    for at, (run, number, name) in enumerate(found):
        if runs == 1:
            lines.append(Line(name, run.metrics[name], colour=at, smoothed=smoothed))
        else:
            dashed = not name.startswith("train/") and any(other.startswith("train/") for _, _, other in found)
            label = f"{run.name}: {name}"
            lines.append(Line(label, run.metrics[name], colour=number, dashed=dashed, smoothed=smoothed))
    return lines
