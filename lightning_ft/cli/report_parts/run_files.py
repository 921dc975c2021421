"""What a run has left in its folder, read as it is: finished, interrupted or still being written."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_ft.cli.names import near_file
from lightning_ft.cli.run_folder import CONFIG, METRICS, ROW, SUMMARY
from lightning_ft.functional.errors import Refusal

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class RunFiles:
    """The logged files of one run.

    Attributes:
        path: the run's folder.
        metrics: name -> (optimizer step, counted from 1, value), in order; a value may be NaN or infinite.
        config: of config.yaml; empty without one.
        config_text: the same as it stands there.
        summary: of summary.json; empty without one.
        row: of row.json: the first training row, as ``{where, tokens, scored, pieces: [{text, scored}]}``.
        samples: file name without its ending -> lines of ``{step, prompt, answer}``.
        notes: what could not be read, in sentences.
    """

    path: Path
    metrics: dict[str, Points] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] | None = None
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @classmethod
    def read(cls, path: str | Path) -> RunFiles:
        """Everything that is there.

        Raises:
            Refusal: the folder is not there, or holds nothing that a fit writes.
        """
        folder = Path(path)
        if not folder.is_dir():
            below = Path("runs") / folder
            hint = f"; did you mean {below}?" if below.is_dir() else near_file(folder) or "."
            raise Refusal(
                f"{folder} is a file, not the folder of a run."
                if folder.exists()
                else f"There is no run {folder}{hint}"
            )
        if not any((folder / name).is_file() for name in (CONFIG, METRICS, SUMMARY)):
            raise Refusal(
                f"{folder} is not a run: it holds neither {CONFIG} nor {METRICS}; a run is a folder that fit has written, "
                "such as runs/sft_lora."
            )
        notes: list[str] = []
        text = _text(folder / CONFIG)
        return cls(
            path=folder,
            metrics=read_metrics(_text(folder / METRICS)),
            config=_config(text, notes),
            config_text=text,
            summary=_json(folder / SUMMARY, notes) or {},
            row=_json(folder / ROW, notes),
            samples=_samples(folder, notes),
            notes=notes,
        )


def read_metrics(text: str) -> dict[str, Points]:
    """The columns of a metrics file that hold numbers.

    A last line without its end is left out: it is being written now, and a number cut short looks like another number.
    """
    whole = text[: text.rfind("\n") + 1]
    found: dict[str, Points] = {}
    for line in csv.DictReader(io.StringIO(whole)):
        step = _number(line.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, cell in line.items():
            value = _number(cell) if name not in ("step", "epoch", None) else None
            if value is not None:
                found.setdefault(name, []).append((int(step) + 1, value))
    return found


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _config(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        notes.append(f"{CONFIG} is not valid YAML.")
        return {}
    return found if isinstance(found, dict) else {}


def _json(file: Path, notes: list[str]) -> dict[str, Any] | None:
    text = _text(file)
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        notes.append(f"{file.name} is not valid JSON.")
        return None
    return found if isinstance(found, dict) else None


def _samples(folder: Path, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Each file of answers: SampleGenerations names it after itself, so it is known by what it holds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        text = _text(file)
        for line in text[: text.rfind("\n") + 1].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                notes.append(f"{file.name} has a line that is not valid JSON.")
                continue
            if isinstance(row, dict) and {"step", "prompt", "answer"} <= set(row):
                found.setdefault(file.stem, []).append(row)
    return found
