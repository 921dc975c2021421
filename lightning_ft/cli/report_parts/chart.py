"""Line charts as SVG text: axes, round ticks, a title under the pointer; no script, no other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lightning_ft.cli.readable import number

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 42  # margins: tick labels on the left and below
DOTS = 40  # up to so many points of a line are drawn as dots too
HOVER = 250  # at most so many points of a line answer to the pointer
MOST = 1000  # points of a line that are drawn; more would lie on the same pixels
SMOOTHED = 40  # from so many points on, a mean over neighbours is drawn over what was logged

Point = tuple[float, float]
Place = Callable[[Point], Point]  # data -> coordinates of the viewBox


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: for the legend and the pointer.
        points: (x, y), x rising; a y that is no number leaves a gap.
        colour: number of the colour, from 0; they repeat after eight.
        dashed: drawn so, to tell two lines of one colour apart.
        smoothed: draw a mean over neighbours above many points; False for what is a mean already.
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    smoothed: bool = True


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "optimizer step",
    x_name: str = "step",
    whole: bool = True,
    caption: str = "",
) -> str:
    """A ``<figure>`` with its legend; says so where there is nothing to draw.

    Args:
        title: above the chart.
        lines: what to draw; points that are no numbers are counted below it.
        x_label: under the horizontal axis.
        x_name: the same in a word, for the pointer.
        whole: whether x are whole numbers, as steps are.
        caption: a sentence below.
    """
    drawn = [(line, finite(line.points)) for line in lines]
    points = [point for _, found in drawn for point in found]
    missing = sum(len(line.points) for line in lines) - len(points)
    notes = [caption] if caption else []
    if missing:
        notes.append(f"{missing} logged {'value is' if missing == 1 else 'values are'} NaN or infinite: left out.")
    if any(line.smoothed and len(found) >= SMOOTHED for line, found in drawn):
        notes.append("Pale: as logged. Strong: mean over neighbouring points.")
    head = f"<figure><h3>{escape(title)}</h3>{_legend(drawn)}"
    foot = f"<figcaption>{escape(' '.join(notes))}</figcaption></figure>" if notes else "</figure>"
    if not points:
        return f'{head}<p class="empty">No number was logged.</p>{foot}'
    return head + _svg(title, drawn, x_label, x_name, whole) + foot


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten, at most ``most`` and a few."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """As many digits as tell neighbouring ticks apart."""
    if abs(value) < step / 1e6:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean over ``width`` neighbours, the value itself in the middle; narrower near the ends, so that they do not bend."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = width // 2
    means = []
    for at in range(len(values)):
        reach = min(half, at, len(values) - 1 - at)
        means.append((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1))
    return means


def thin(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about ``most`` points, the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretches = most // 2
    for number_ in range(stretches):
        stretch = points[number_ * len(points) // stretches : (number_ + 1) * len(points) // stretches]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def _svg(title: str, drawn: Sequence[tuple[Line, list[Point]]], x_label: str, x_name: str, whole: bool) -> str:
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_low, x_high = _padded(min(0, *xs), max(xs), 0)  # from 0, so that charts of one run can be read beside one another
    y_low, y_high = _padded(min(ys), max(ys), 0.06)

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_high - point[1]) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return x, y

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>']
    parts += _axes(place, (x_low, x_high), (y_low, y_high), x_label, whole)
    for line, points in drawn:
        parts += _curve(line, points, place)
    parts += [mark for line, points in drawn for mark in _marks(line, points, place, x_name, whole)]  # above all curves
    return "".join(parts) + "</svg>"


def _padded(low: float, high: float, share: float) -> Point:
    """The range of an axis: a little more than the data, and never empty."""
    if high > low:
        return low - share * (high - low), high + share * (high - low)
    around = abs(low) / 2 or 1.0
    return low - around, high + around


def _axes(place: Place, x_range: Point, y_range: Point, x_label: str, whole: bool) -> list[str]:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    found = ticks(*y_range)
    for value in found:
        y = place((x_range[0], value))[1]
        label = tick_label(value, _step(found))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    found = [value for value in ticks(*x_range) if not whole or value == int(value)]
    for value in found:
        x = place((value, y_range[0]))[0]
        label = tick_label(value, _step(found))
        parts.append(f'<path class="axis" d="M{x:.1f} {base}v5"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 19}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _step(found: Sequence[float]) -> float:
    return found[1] - found[0] if len(found) > 1 else abs(found[0]) or 1.0 if found else 1.0


def _curve(line: Line, points: list[Point], place: Place) -> list[str]:
    """The line as logged; with many points pale, and its mean over neighbours above it. Gaps stay gaps."""
    style = f"line c{line.colour % 8}" + (" dashed" if line.dashed else "")
    pale = " pale" if line.smoothed and len(points) >= SMOOTHED else ""
    parts = [f'<path class="{style}{pale}" d="{_path(run, place)}"/>' for run in _runs(line.points)]
    if pale:
        for run in _runs(line.points):
            means = smooth([y for _, y in run], max(3, len(points) // 25))
            smoothed = list(zip((x for x, _ in run), means, strict=True))
            parts.append(f'<path class="{style}" d="{_path(smoothed, place)}"/>')
    return parts


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches of finite neighbours."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(points: Sequence[Point], place: Place) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, thin(points)))


def _marks(line: Line, points: list[Point], place: Place, x_name: str, whole: bool) -> list[str]:
    """Small dots where there are few points, and larger invisible ones that show their value under the pointer."""
    parts = []
    if len(points) <= DOTS:
        parts += [
            f'<circle class="dot c{line.colour % 8}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in map(place, points)
        ]
    for point in thin(points, HOVER):
        x, y = place(point)
        says = f"{line.label}, {x_name} {f'{point[0]:,.0f}' if whole else number(point[0])}: {number(point[1])}"
        parts.append(f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(says)}</title></circle>')
    return parts


def _legend(drawn: Sequence[tuple[Line, list[Point]]]) -> str:
    keys = []
    for line, points in drawn:
        last = f" <b>{number(points[-1][1])}</b>" if points else ""
        dashes = " dashed" if line.dashed else ""
        swatch = (
            f'<svg class="swatch" viewBox="0 0 26 8"><path class="line c{line.colour % 8}{dashes}" d="M0 4H26"/></svg>'
        )
        keys.append(f"<li>{swatch}{escape(line.label)}{last}</li>")
    return f'<ul class="legend">{"".join(keys)}</ul>'
