"""The panels of a report that are text: a row with its scored tokens marked, answers, the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from lightning_ft.cli.report_parts.run_files import RunFiles

EMPTY = '<span class="empty">(empty)</span>'


def each(show: Callable[[RunFiles], str | None]) -> Callable[[Sequence[RunFiles]], str | None]:
    """A panel that shows runs one below the other, those without it left out."""

    def panel(runs: Sequence[RunFiles]) -> str | None:
        shown = [(run, found) for run in runs if (found := show(run))]
        if len(runs) == 1:
            return shown[0][1] if shown else None
        return "".join(f"<h3>{escape(run.name)}</h3>{found}" for run, found in shown) or None

    return panel


@each
def masked_row(run: RunFiles) -> str | None:
    """The first training row; what the loss counts is marked."""
    pieces = (run.row or {}).get("pieces")
    if not isinstance(pieces, list) or run.row is None:
        return None
    text = "".join(
        f'<mark class="scored">{escape(str(piece.get("text", "")))}</mark>'
        if piece.get("scored")
        else escape(str(piece.get("text", "")))
        for piece in pieces
        if isinstance(piece, dict)
    )
    where = f"{run.row.get('where', 'a row')}: {run.row.get('tokens', '?')} tokens, {run.row.get('scored', '?')} of them scored"
    return f'<p>{escape(where)} (<mark class="scored">marked</mark>).</p><pre class="row">{text}</pre>'


@each
def answers(run: RunFiles) -> str | None:
    """The model's answers before the first step and at the last, side by side; those in between can be unfolded."""
    parts = []
    for name, rows in run.samples.items():
        table = _before_and_after(rows)
        parts.append(table if len(run.samples) == 1 else f"<h4>{escape(name)}</h4>{table}")
    own = run.summary.get("samples")  # `make quickstart` keeps its three there
    if not parts and isinstance(own, list) and all(isinstance(row, dict) for row in own):
        cells = [[row.get(key, "") for key in ("sentence", "before", "after")] for row in own]
        parts.append(_table(["prompt", "before", "after"], cells))
    return "".join(parts) or None


@each
def configuration(run: RunFiles) -> str | None:
    """config.yaml as it stands, without the lines that say null."""
    lines = [line for line in run.config_text.splitlines() if not line.rstrip().endswith(": null")]
    if not lines:
        return None
    again = f"lightning-ft fit --config {run.path / 'config.yaml'}"
    return f"<p><code>{escape(again)}</code> repeats this run.</p><pre>{escape(chr(10).join(lines))}</pre>"


def differences(runs: Sequence[RunFiles]) -> str | None:
    """The keys of the configurations that are not equal in all runs; nothing for one run."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "name"]
    rows = [
        [key, *(one.get(key, "–") for one in flat)] for key in keys if len({repr(one.get(key)) for one in flat}) > 1
    ]
    return _table(["", *(run.name for run in runs)], rows) if rows else None


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys as a command line takes them, so without ``init_args``."""
    if isinstance(config, dict) and config:
        for name, value in config.items():
            yield from _flat(value, prefix if name == "init_args" else f"{prefix}.{name}".lstrip("."))
    else:
        yield prefix, config


def _before_and_after(rows: list[dict[str, Any]]) -> str:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    by_prompt: dict[str, dict[Any, str]] = {}
    for row in rows:
        by_prompt.setdefault(str(row["prompt"]), {})[row["step"]] = str(row["answer"])
    first, last = steps[0], steps[-1]
    shown = [first] if first == last else [first, last]
    titles = [f"before (step {first})" if first == 0 else f"step {first}", f"after (step {last})"][: len(shown)]
    table = _table(["prompt", *titles], [[p, *(a.get(step, "") for step in shown)] for p, a in by_prompt.items()])
    if len(steps) < 3:
        return table
    every = _table(["prompt", "step", "answer"], [[row["prompt"], row["step"], row["answer"]] for row in rows])
    return f"{table}<details><summary>All {len(steps)} times</summary>{every}</details>"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell)) or EMPTY}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="texts"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
