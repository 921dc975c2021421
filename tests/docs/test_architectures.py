"""The table of architectures says what the admission check says, on two rows that hold every kind of cell."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_rows() -> None:
    spec = importlib.util.spec_from_file_location("render_architectures", ROOT / "docs" / "render_architectures.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    rows, numbered = page.splitlines(), {}
    for line in rows:
        if line[:1].isdigit():
            number, reason = line.split(". ", 1)
            numbered[f"({number})"] = reason
    for kind in ("distilbert", "mbart"):
        row = next(line for line in rows if line.startswith(f"| {script.NAMES[kind]} |"))
        for task, cell in zip(script.TASKS, row.strip("| ").split(" | ")[1:], strict=True):
            word, _, number = cell.partition(" ")
            assert (word, numbered.get(number, "")) == script.verdict(kind, task)
    assert all(f"| {name} |" in page for name in script.NAMES.values())
