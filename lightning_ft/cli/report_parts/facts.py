"""The table of a report: what was trained, how long it took, what came out; a column a run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning_ft.cli.readable import duration, number, percent, size, trained
from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.cli.scores import row_interval

STATUS = {
    "training": "still going, or killed: these are the figures of its last validation",
    "stopped": "stopped before its end",
    "finished": "finished",
}


def facts(runs: Sequence[RunFiles]) -> str | None:
    """One row a fact that any of the runs knows."""
    columns = [facts_of(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return None
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(runs) > 1 else ""
    rows = []
    for name in names:
        cells = "".join(f"<td>{escape(column.get(name, '–'))}</td>" for column in columns)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def facts_of(run: RunFiles) -> dict[str, str]:
    """What is known of one run: from its summary, else from its configuration."""
    known = run.summary
    found: dict[str, Any] = {
        "base model": known.get("base") or _configured(run, "model", "base"),
        "task": " ".join(str(part) for part in (known.get("module"), known.get("task")) if part),
        "data": known.get("data") or _configured(run, "data", "path"),
        "techniques": ", ".join(known["techniques"]) or "none: everything is trained"
        if "techniques" in known
        else None,
    }
    total = known.get("total_parameters") or known.get("parameters")
    if total and known.get("trainable_parameters") is not None:
        found["trained"] = trained(known["trainable_parameters"], total)
    found["peak learning rate"] = _say(known.get("learning_rate"), number)
    steps = known.get("steps", known.get("optimizer_steps"))
    epochs = known.get("epochs")
    if steps is not None:
        found["optimizer steps"] = f"{steps:,}" + (f", {number(epochs)} epochs" if epochs else "")
    found["time"] = _say(known.get("train_seconds"), duration)
    found["tokens per second"] = _say(known.get("tokens_per_second"), number)
    found["peak memory"] = _say(known.get("peak_memory_bytes"), size)
    found |= _scores(run)
    where = known.get("checkpoints") or {}
    found["best checkpoint"] = where.get("best")
    found["last checkpoint"] = where.get("last")
    if "device" in known:
        found["device"] = f"{known.get('devices', 1)} x {known['device']}, precision {known.get('precision')}"
    found["versions"] = ", ".join(f"{name} {version}" for name, version in (known.get("versions") or {}).items())
    found["status"] = STATUS.get(str(known.get("status")), "")
    return {name: str(value) for name, value in found.items() if value}


def _scores(run: RunFiles) -> dict[str, str]:
    """The last value of each validation metric, with its interval where it is a share of rows."""
    known = run.summary
    found = {}
    for name, value in (known.get("metrics") or {}).items():
        if name.startswith("val/"):
            interval = row_interval(name, value, known.get("val_rows"))
            found[name] = number(value) + (f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
    if known.get("val_rows"):
        found["validation rows"] = f"{known['val_rows']:,}"
    for when in ("before", "after"):  # what `make quickstart` measures on held-out rows
        value, interval = known.get(f"accuracy_{when}"), known.get(f"accuracy_{when}_95")
        if value is not None and interval:
            found[f"held-out accuracy {when}"] = f"{number(value)} (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
    speed = known.get("trainable_share")
    if speed is not None and "trainable_parameters" not in known:
        found["trained"] = percent(speed)
    return found


def _configured(run: RunFiles, part: str, key: str) -> Any:
    section = run.config.get(part)
    section = section.get("init_args", section) if isinstance(section, dict) else {}
    return section.get(key) if isinstance(section, dict) else None


def _say(value: Any, how: Any) -> str | None:
    return how(value) if isinstance(value, (int, float)) else None
