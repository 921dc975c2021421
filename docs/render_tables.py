"""Writes the generated tables of docs/ from the code: arguments from docstrings, refusals from the compatibility rules.

    python docs/render_tables.py

A page marks where a table stands; what is between the marks is replaced:

    <!-- generated: arguments LoRA -->    <!-- generated: refusals LoRA -->    <!-- generated: compatibility -->
    <!-- end -->
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from docstring_parser import parse

import lightning_ft
from lightning_ft.cli.slots import techniques
from lightning_ft.engine.compatibility import table

DOCS = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- generated: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def rows_of(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def arguments(cls: Any) -> str:
    """Name, default and meaning of each argument of a public class."""
    meaning = {p.arg_name: " ".join((p.description or "").split()) for p in parse(inspect.getdoc(cls) or "").params}
    found = []
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name != "self":
            default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
            found.append((f"`{name}`", default, meaning[name].replace("``", "`")))
    return rows_of(("argument", "default", "meaning"), found)


def refusals(name: str | None) -> str:
    """What is refused, why, and the way out: of one technique, or of all."""
    classes = [cls for cls in techniques().values() if name in (None, cls.__name__)]
    found = table(classes)
    if name is not None:
        found = [row for row in found if row[0] in (name, "any technique")]
    return rows_of(("technique", "cannot meet", "because", "instead"), found)


def render(text: str) -> str:
    """A page with its generated blocks filled anew."""

    def block(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        content = arguments(getattr(lightning_ft, name)) if kind == "arguments" else refusals(name)
        return f"{start}{content}{end}"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(DOCS)} brought up to date")
