"""Curves and stacked bars as inline SVG, written by hand: a path each, and nothing that needs a library.

The SVG holds only shapes and is stretched to the width there is (`preserveAspectRatio="none"`, strokes that do not
scale); ticks and labels are HTML beside it, so that they are readable on a phone as on a desk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from eco_llm.proof.report.document import LineChart, Series, StackedBars
from eco_llm.proof.report.numbers import significant

WIDTH, HEIGHT = 1000, 400
_POINTS = 400
_HUES = 8


@dataclass(frozen=True)
class Tick:
    """A label and where it stands, in percent from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Drawing:
    """A chart ready for the page: shapes, ticks, and the points a pointer can read."""

    shapes: Markup
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: dict[str, object]
    note: str


@dataclass(frozen=True)
class Drawn:
    """One series as drawn: x, y [n]; low, high [n] or None where every point is shown."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


def thin(x: NDArray[np.float64], y: NDArray[np.float64], points: int = _POINTS) -> Drawn:
    """At most `points` points: the median of each stretch of rows, with its smallest and largest value.

    Stretches are of one length (but the last), or noise would look smaller where more rows share a point.
    """
    if x.size <= points:
        return Drawn(x, y)
    length = -(-x.size // points)
    parts = [slice(i, min(i + length, x.size)) for i in range(0, x.size, length)]
    return Drawn(
        np.array([x[p][-1] for p in parts]),
        np.array([np.median(y[p]) for p in parts]),
        np.array([y[p].min() for p in parts]),
        np.array([y[p].max() for p in parts]),
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) in [low, high], about `wanted` of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * m for m in (1, 2, 5) if size * m >= 0.7 * raw), size * 10)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(chart: LineChart) -> Drawing:
    """Geometry of a line chart."""
    drawn = [thin(s.x, s.y) for s in chart.series]
    left = min(float(s.x.min()) for s in chart.series)
    right = max(float(s.x.max()) for s in chart.series)
    if left == right:
        left, right = left - 1, right + 1
    bottom, top, above = _range(chart)
    note = ""
    if above:
        highest = max(float(s.y.max()) for s in chart.series)
        note = (
            f"{above:,} points above {significant(top, 4)} are off the chart; the largest is {significant(highest, 5)}."
        )

    def px(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - left) / (right - left) * WIDTH

    def py(y: NDArray[np.float64]) -> NDArray[np.float64]:
        return HEIGHT - (np.clip(y, bottom, top) - bottom) / (top - bottom) * HEIGHT

    x_marks, y_marks = ticks(left, right), ticks(bottom, top, 4)
    grid = "".join(f"M0 {_c(y)}H{WIDTH}" for y in py(np.array(y_marks)))
    shapes = [f'<path class="grid" d="{grid}"/>']
    for s, d in zip(chart.series, drawn, strict=True):
        hue, xs = f"h{s.hue % _HUES}", px(d.x)
        if d.low is not None and d.high is not None:
            there = _points(xs, py(d.high))
            back = _points(xs[::-1], py(d.low)[::-1])
            shapes.append(f'<path class="band {hue}" d="M{there}L{back}Z"/>')
        if s.dots:
            dots = "".join(f"M{_c(x)} {_c(y)}h0" for x, y in zip(xs, py(d.y), strict=True))
            shapes.append(
                f'<path class="line thin {hue}" d="M{_points(xs, py(d.y))}"/><path class="dots {hue}" d="{dots}"/>'
            )
        elif d.x.size == 1:
            shapes.append(f'<path class="dots {hue}" d="M{_c(xs[0])} {_c(py(d.y)[0])}h0"/>')
        else:
            shapes.append(f'<path class="line {hue}" d="M{_points(xs, py(d.y))}"/>')
    return Drawing(
        Markup("".join(shapes)),  # numbers and our own class names only
        tuple(Tick(round(100 * (x - left) / (right - left), 2), _short(x)) for x in x_marks),
        tuple(Tick(round(100 - 100 * (y - bottom) / (top - bottom), 2), _short(y)) for y in y_marks),
        {
            "x": chart.x_label,
            "from": _r(left),
            "to": _r(right),
            "bottom": _r(bottom),
            "top": _r(top),
            "series": [_readable(s, d) for s, d in zip(chart.series, drawn, strict=True)],
        },
        note,
    )


def _range(chart: LineChart) -> tuple[float, float, int]:
    """(bottom, top, points above the top): a few wild values do not flatten everything else."""
    values = np.concatenate([s.y for s in chart.series])
    low, high = float(values.min()), float(values.max())
    usual = float(np.percentile(values, 99))
    floor = 0.0 if chart.from_zero and low >= 0 else low
    top = high
    if values.size >= 50 and high - usual > 2 * (usual - floor) and usual > floor:
        top = usual + 0.25 * (usual - floor)
    if top == floor:
        top, floor = top + (abs(top) or 1.0) * 0.5, floor - (0.0 if chart.from_zero else (abs(floor) or 1.0) * 0.5)
    margin = 0.04 * (top - floor)
    return (
        (0.0 if floor == 0.0 and chart.from_zero else floor - margin),
        top + margin,
        int((values > top + margin).sum()),
    )


def bar_shapes(bars: StackedBars) -> list[tuple[str, str, Markup]]:
    """(label, total in words, shapes) of each bar; the longest fills the width."""
    longest = max((sum(values) for _, values, _ in bars.bars), default=0.0)
    drawn = []
    for label, values, total in bars.bars:
        at, shapes = 0.0, []
        for i, value in enumerate(values):
            width = WIDTH * value / longest if longest > 0 and math.isfinite(value) else 0.0
            if width > 0:
                shapes.append(f'<rect class="p{i}" x="{_c(at)}" y="0" width="{_c(width)}" height="40"/>')
            at += width
        drawn.append((label, total, Markup("".join(shapes))))
    return drawn


def _readable(series: Series, drawn: Drawn) -> dict[str, object]:
    x = np.round(drawn.x, 1)
    return {"name": series.name, "x": [_r(v) for v in x], "y": [_r(v) for v in drawn.y]}


def _r(value: float) -> float:
    """Five digits are enough to read; whole numbers stay whole."""
    value = float(value)
    return int(value) if value == int(value) else float(f"{value:.6g}")


def _short(value: float) -> str:
    """A tick's label: 12.5k, 3.2M, 0.002."""
    value = float(f"{value:.12g}")
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            size = 1e3 if letter == "k" else size
            return f"{value / size:,.4g}{letter}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _c(value: float) -> str:
    """A coordinate: one decimal, no trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


def _points(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return "L".join(f"{_c(a)} {_c(b)}" for a, b in zip(x, y, strict=True))
