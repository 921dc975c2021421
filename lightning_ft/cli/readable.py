"""Numbers as people read them: bytes, seconds, counts, scores."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes, in units of 1000: ``3.76 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds: ``4.2 s``, ``2 min 30 s``, ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """A score or a rate, with four digits that count: ``0.9067``, ``2.54e-05``, ``12,345``; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def trained(part: int, whole: int) -> str:
    """``2,442,240 of 136,957,248 parameters (1.78 %)``."""
    return f"{part:,} of {whole:,} parameters ({percent(part / max(whole, 1))})"


def percent(share: float) -> str:
    """A share: ``1.78 %``."""
    return f"{100 * share:.2f} %"
