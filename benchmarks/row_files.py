"""Rows of data as files of JSON lines; needs nothing but Python."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def written(file: Path, rows: Iterable[Mapping[str, Any]], *, ascii_only: bool = True) -> str:
    """The path of the rows as a file, which appears whole or not at all; its folder is made.

    Args:
        file: where.
        rows: one a line.
        ascii_only: whether other letters are escaped.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    return str(part.replace(file))


def read(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


__all__ = ["read", "written"]
