"""Curves as SVG: drawn by hand, so that they follow the page's colours, stay sharp on any screen and need no
script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from fastgessl.report.record import Series

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
# More points than pixels say nothing.
MOST_POINTS = 400


def line_chart(
    title: str, series: Mapping[str, Series], unit: str = "", colours: Mapping[str, int] | None = None
) -> str:
    """A figure with a line for each named series of steps and values; `colours` gives each the number of its
    colour.

    >>> line_chart("loss", {"run": ([1.0, 2.0], [3.0, 1.0])}).count("<polyline")
    1
    """
    drawn = {name: _thinned(*points) for name, points in series.items() if points[0]}
    if not drawn:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="none">not logged in this run</p></figure>'
    steps = [step for points in drawn.values() for step in points[0]]
    values = [value for points in drawn.values() for value in points[1]]
    across, down = _ticks(min(steps), max(steps), 4), _ticks(min(values), max(values), 4)
    horizontal = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    vertical = _scale(down[0], down[-1], HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, down, horizontal, vertical)]
    for number, (name, (xs, ys)) in enumerate(drawn.items()):
        points = " ".join(
            f"{_at(horizontal, x):.1f},{_at(vertical, y):.1f}" for x, y in zip(xs, ys, strict=True)
        )
        colour = (colours or {}).get(name, number) % 10
        if len(xs) == 1:
            points = f"{points} {points}"
        parts.append(
            f'<polyline class="c{colour}" points="{points}"><title>{escape(name)}</title></polyline>'
        )
    last = next(iter(drawn.values()))[1][-1]
    caption = (
        f"{escape(title)} <b>{_number(last)}</b> {escape(unit)}"
        if len(drawn) == 1
        else f"{escape(title)} {escape(unit)}"
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{picture}</figure>'


def _thinned(xs: list[float], ys: list[float]) -> Series:
    """At most `MOST_POINTS` points: means of neighbouring ones, the last kept as it is."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    size = math.ceil(len(xs) / MOST_POINTS)
    blocks = [(xs[start : start + size], ys[start : start + size]) for start in range(0, len(xs) - 1, size)]
    means = [(sum(steps) / len(steps), sum(values) / len(values)) for steps, values in blocks]
    return [step for step, _ in means] + [xs[-1]], [value for _, value in means] + [ys[-1]]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`.

    >>> _ticks(0.2, 3.1, 4)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    span = high - low or abs(high) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step) * step
    return [
        round(first + number * step, 12)
        for number in range(max(2, math.ceil((high - first) / step - 1e-9) + 1))
    ]


def _scale(low: float, high: float, start: float, end: float) -> tuple[float, float]:
    """Offset and factor of the line through (low, start) and (high, end)."""
    factor = (end - start) / ((high - low) or 1.0)
    return start - low * factor, factor


def _at(scale: tuple[float, float], value: float) -> float:
    return scale[0] + scale[1] * value


def _grid(
    across: list[float], down: list[float], horizontal: tuple[float, float], vertical: tuple[float, float]
) -> str:
    lines = []
    for value in down:
        y = _at(vertical, value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="down" x="{LEFT - 6}" y="{y + 4:.1f}">{_number(value)}</text>')
    for value in across:
        x = _at(horizontal, value)
        if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
            lines.append(f'<text class="across" x="{x:.1f}" y="{HEIGHT - 6}">{_number(value)}</text>')
    return "".join(lines)


def _number(value: float) -> str:
    """Short: 0.0123, 1,200, 3.2e-06.

    >>> _number(0.0), _number(1234567.0), _number(0.01234)
    ('0', '1,234,567', '0.0123')
    """
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
