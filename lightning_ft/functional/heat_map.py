"""A matrix of numbers as a picture: SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_CELL, _LINE, _SIGN = 58, 34, 7.6  # pixels: width and height of a cell, width of a letter at 12 px in a wide font
_WORST, _BEST = (247, 251, 255), (8, 81, 156)  # a scale of one colour, as ColorBrewer's Blues: readable in grey too


def heat_map(
    rows: Sequence[Sequence[float | None]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    higher_is_better: bool = True,
    corner: str = "",
) -> str:
    """The matrix with each number in a cell, the darker the better.

    Args:
        rows: (n, K); None leaves a cell empty.
        row_names: (n,).
        column_names: (K,).
        higher_is_better: which end of the scale is dark.
        corner: what rows and columns are, in a few letters.
    """
    known = [value for row in rows for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    left = round(14 + _SIGN * max((len(name) for name in (*row_names, corner)), default=0))
    widths = [max(_CELL, round(14 + _SIGN * len(name))) for name in column_names]
    begins = [left + sum(widths[:j]) for j in range(len(widths) + 1)]
    width, height = begins[-1] + 8, _LINE * (len(rows) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">'
    ]
    if corner:
        parts.append(f'<text x="{left - 8}" y="22" text-anchor="end" fill="#667">{escape(corner)}</text>')
    for j, name in enumerate(column_names):
        parts.append(f'<text x="{begins[j] + widths[j] / 2}" y="22" text-anchor="middle">{escape(name)}</text>')
    for i, (name, row) in enumerate(zip(row_names, rows, strict=True)):
        top = _LINE * (i + 1)
        parts.append(f'<text x="{left - 8}" y="{top + 21}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(row):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.5
            share = share if higher_is_better else 1 - share
            colour = ",".join(str(round(a + share * (b - a))) for a, b in zip(_WORST, _BEST, strict=True))
            ink = "white" if share > 0.5 else "black"
            parts.append(
                f'<rect x="{begins[j]}" y="{top}" width="{widths[j] - 2}" height="{_LINE - 2}" fill="rgb({colour})"/>'
                f'<text x="{begins[j] + widths[j] / 2 - 1}" y="{top + 21}" text-anchor="middle" fill="{ink}">{value:.3f}</text>'
            )
    return "\n".join([*parts, "</svg>\n"])


__all__ = ["heat_map"]
