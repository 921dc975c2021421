"""What pages of results share: where was measured, and blocks of the docs from ``<!-- measured: NAME -->`` to ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine(data: dict[str, Any]) -> str:
    """Where the runs of a `benchmarks.runs.Store` were measured."""
    found = data["machine"]
    devices = sorted({run["device"] for run in data["runs"].values()})
    versions = ", ".join(f"{name} {found['versions'].get(name)}" for name in ("torch", "lightning", "transformers"))
    return f"{found['cpu']}, {found['cores']} cores; {', '.join(devices) or 'nothing has run'}; {versions}."


def fill(page: Path, name: str, lines: Sequence[str]) -> None:
    """Writes the block of that name anew.

    Raises:
        ValueError: the page has no such block.
    """
    text = page.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if block.search(text) is None:
        raise ValueError(f"{page} has no block `measured: {name}`.")
    written = "\n".join(["", *lines, "", ""]) if lines else ""
    page.write_text(block.sub(lambda found: found[1] + written + found[2], text), encoding="utf-8")
