"""Line charts over the steps of a run, as inline SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette without its yellow, which is too pale on white. Further lines are dashed."""

WIDTH, HEIGHT = 220, 150
"""Size of a chart in its own units, about a pixel each. It grows and shrinks with its column."""
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 28
"""Margins of a chart's frame. The left one grows with the longest number beside it."""
CHARACTER = 6.2
"""Width of a character beside the frame."""
MOST_POINTS = 400
"""Most points that are drawn of a line: more than it has pixels."""
DOTTED = 40
"""A line of at most this many points has a dot at each, so that single values show."""
TICKS = 5
"""About as many numbers on each axis."""


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    """The run that it belongs to."""
    number: int
    """Number of the run, which chooses the color."""
    points: Sequence[tuple[float, float]]
    """Step and value, steps ascending. Values that are not finite are left out."""


@dataclass(frozen=True)
class Frame:
    """The rectangle of a chart, and the ranges that it covers."""

    steps: tuple[float, float]
    values: tuple[float, float]
    left: float
    """Margin to the left, which holds the numbers of the axis."""

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Return x and y of a point."""
        (first, last), (low, high) = self.steps, self.values
        x = self.left + (step - first) / (last - first) * (WIDTH - self.left - RIGHT)
        return x, HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, labels: Sequence[tuple[float, str]]) -> str:
        """Return the SVG of both axes; `labels` are the numbers of the vertical one."""
        parts = []
        for value, text in labels:
            y = self.place(self.steps[0], value)[1]
            parts.append(f'<path class="rule" d="M{self.left:g} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="y" x="{self.left - 5:g}" y="{y + 3.5:.1f}">{text}</text>')
        for step, text in ticks(*self.steps, whole=True):
            x = self.place(step, self.values[0])[0]
            parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}">{text}</text>')
        parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">step</text>')
        return "".join(parts)

    def line(self, number: int, points: Sequence[tuple[float, float]]) -> str:
        """Return the SVG of a line, with dots if its points are few."""
        color, dashes = ink(number)
        places = [f"{x:.1f} {y:.1f}" for x, y in (self.place(*point) for point in points)]
        path = f'<path class="line" stroke-dasharray="{dashes}" d="M{"L".join(places)}"/>'
        dots = f'<path class="dots" d="M{"h0M".join(places)}h0"/>' if len(points) <= DOTTED else ""
        return f'<g stroke="{color}">{path}{dots}</g>'


def ink(number: int) -> tuple[str, str]:
    """Return color and dashes of a line."""
    return INKS[number % len(INKS)], "4 2" if number // len(INKS) % 2 else ""


def key(number: int, name: str) -> str:
    """Return the HTML of a name with a sample of its line."""
    color, dashes = ink(number)
    dashed = " dashed" if dashes else ""
    return f'<span class="key{dashed}" style="border-color: {color}"></span>{escape(name)}'


def chart(title: str, unit: str, lines: Sequence[Line], percent: bool = False, from_zero: bool = False) -> str:
    """Return the HTML of a line chart over steps; a script of the page shows the values under the pointer.

    Args:
        title: what is drawn.
        unit: of the values.
        lines: at least one of them has a finite value.
        percent: values are fractions of 1 and are shown in percent.
        from_zero: the vertical axis includes 0, for values whose ratios matter.
    """
    drawn = [(line, thinned([(step, value) for step, value in line.points if math.isfinite(value)])) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    steps = [step for _, points in drawn for step, _ in points]
    values = [value for _, points in drawn for _, value in points]
    low, high = _widened(min(0.0, *values) if from_zero else min(values), max(values))
    labels = ticks(low, high, percent)
    left = max(LEFT, 7 + math.ceil(CHARACTER * max(len(text) for _, text in labels)))
    frame = Frame(_widened(min(steps), max(steps)), (low, high), left)
    data = {
        "lines": [{"name": line.name, "color": ink(line.number)[0], "points": points} for line, points in drawn],
        "x": frame.steps,
        "y": frame.values,
        "frame": [left, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "percent": percent,
    }
    inner = frame.axes(labels) + "".join(frame.line(line.number, points) for line, points in drawn)
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{unit}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step" '
        f'data-chart="{escape(json.dumps(data))}">{inner}</svg></figure>'
    )


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` of the points: the lowest and the highest of each group of neighbors, and the last one.

    `most` is even. No spike is lost, and nothing is averaged: every point that is drawn was logged.
    """
    if len(points) <= most:
        return list(points)
    kept = []
    groups = most // 2 - 1
    for number in range(groups):
        group = points[number * (len(points) - 1) // groups : (number + 1) * (len(points) - 1) // groups]
        kept += sorted({min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])})
    return [*kept, points[-1]]


def ticks(low: float, high: float, percent: bool = False, whole: bool = False) -> list[tuple[float, str]]:
    """Return about `TICKS` round numbers from `low` to `high`, each with its text.

    Their distance is 1, 2 or 5 times a power of ten. Large numbers are in thousands (k) or millions (M).

    Args:
        low, high: the range; `high` is larger.
        percent: the numbers are fractions of 1, and the texts are percentages.
        whole: show whole numbers only.
    """
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    step = max(step, 1.0) if whole else step
    largest = max(abs(low), abs(high))
    if percent:
        scale, unit = 100.0, "%"
    elif largest >= 1e4:
        scale, unit = (1e-6, "M") if largest >= 1e7 else (1e-3, "k")
    else:
        scale, unit = 1.0, ""
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    form = f"{{:.{digits}f}}" if largest >= 1e-4 else "{:g}"
    values = [count * step for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, form.format(value * scale) + unit) for value in values]


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return a range of some length, also if all values are equal."""
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin
