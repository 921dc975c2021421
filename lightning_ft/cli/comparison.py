"""The table of ``lightning-ft compare``: a score with its interval, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ft.cli.readable import duration, number, percent, size
from lightning_ft.cli.scores import Mode, row_interval
from lightning_ft.functional.intervals import mean_interval


@dataclass
class Outcome:
    """What one run left.

    Attributes:
        folder: the run's.
        seed: its seed.
        summary: of its summary.json; empty when it failed.
        exit_code: of its process.
        error: why it failed, in a sentence.
        kept: it was finished before this command began.
    """

    folder: Path
    seed: int
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    error: str | None = None
    kept: bool = False

    def score(self, metric: str) -> float | None:
        """The last value that was logged; None when there is none, or it is no number."""
        value = (self.summary.get("metrics") or {}).get(metric)
        return float(value) if value is not None else None


@dataclass
class Entry:
    """One configuration and its runs."""

    label: str
    outcomes: list[Outcome]


def table(entries: Sequence[Entry], metric: str, mode: Mode) -> list[dict[str, Any]]:
    """One row a configuration, best score first, those without a score last."""
    rows = [_row(entry, metric) for entry in entries]
    sign = 1 if mode == "min" else -1
    return sorted(rows, key=lambda row: math.inf if row["score"] is None else sign * row["score"])


def _row(entry: Entry, metric: str) -> dict[str, Any]:
    scored = [(outcome, score) for outcome in entry.outcomes if (score := outcome.score(metric)) is not None]
    scores = [score for _, score in scored]
    interval, kind = None, None
    if len(scores) > 1:
        interval, kind = mean_interval(scores), "seeds"
    elif scores:
        outcome = scored[0][0]
        interval = row_interval(metric, scores[0], outcome.summary.get("val_rows"))
        kind = "rows" if interval else None
    failed = [_failure(outcome, metric) for outcome in entry.outcomes if outcome.score(metric) is None]
    return {
        "config": entry.label,
        "score": math.fsum(scores) / len(scores) if scores else None,
        "interval": interval,
        "interval_over": kind,
        "scores": scores,
        "seeds": [outcome.seed for outcome, _ in scored],
        "trainable_parameters": _first(scored, "trainable_parameters"),
        "trainable_share": _first(scored, "trainable_share"),
        "peak_memory_bytes": max(_all(scored, "peak_memory_bytes"), default=None),
        "train_seconds": _mean(_all(scored, "train_seconds")),
        "tokens_per_second": _mean(_all(scored, "tokens_per_second")),
        "steps": _mean(_all(scored, "steps")),
        "val_rows": _first(scored, "val_rows"),
        "runs": [str(outcome.folder) for outcome in entry.outcomes],
        "failed": failed,
    }


def _failure(outcome: Outcome, metric: str) -> str:
    if outcome.error is not None:
        return f"seed {outcome.seed}: {outcome.error}"
    logged = outcome.summary.get("metrics") or {}
    if metric in logged:
        return f"seed {outcome.seed}: its last {metric} is not a finite number."
    others = ", ".join(sorted(name for name in logged if not name.startswith("train/"))) or "no validation metric"
    return f"seed {outcome.seed}: it logged no {metric}, but {others}."


def markdown(rows: Sequence[dict[str, Any]], metric: str, mode: Mode, *, limit: str, seeds: int) -> str:
    """The table with what it means, as Markdown that is aligned enough to be read as it is."""
    head = [
        "configuration",
        f"{metric} (95 %)",
        "seeds",
        "trained",
        "share",
        "peak memory",
        "time",
        "tokens/s",
        "steps",
    ]
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    best = "Lower is better." if mode == "min" else "Higher is better."
    says = [f"{best} Budget of each run: {limit}; {seeds} {'seed' if seeds == 1 else 'seeds'} each."]
    if seeds > 1:
        says.append(
            "Score: mean over seeds, Student's interval of that mean. Time and speed are means, memory is the largest."
        )
    elif any(row["interval_over"] == "rows" for row in rows):
        rows_held = ", ".join(sorted({f"{row['val_rows']:,}" for row in rows if row["val_rows"]}))
        says.append(
            f"Interval: Wilson's over the {rows_held} validation rows; it does not cover what another seed would change."
        )
    else:
        says.append("No interval: one seed says nothing about another; give --seeds 3.")
    says += [f"{row['config']} failed, {reason}" for row in rows for reason in row["failed"]]
    return "\n".join([*lines, "", *says])


def _cells(row: dict[str, Any]) -> list[str]:
    score = number(row["score"])
    if row["interval"]:
        score += f" ({number(row['interval'][0])} to {number(row['interval'][1])})"
    if row["score"] is None:
        score = "failed"
    return [
        row["config"],
        score,
        str(len(row["seeds"])),
        _say(row["trainable_parameters"], lambda value: f"{value:,}"),
        _say(row["trainable_share"], percent),
        _say(row["peak_memory_bytes"], size),
        _say(row["train_seconds"], duration),
        _say(row["tokens_per_second"], number),
        _say(row["steps"], lambda value: f"{value:,.0f}"),
    ]


def _say(value: Any, how: Any) -> str:
    return "–" if value is None else str(how(value))


def _all(scored: Sequence[tuple[Outcome, float]], key: str) -> list[float]:
    return [outcome.summary[key] for outcome, _ in scored if outcome.summary.get(key) is not None]


def _first(scored: Sequence[tuple[Outcome, float]], key: str) -> Any:
    return next(iter(_all(scored, key)), None)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
