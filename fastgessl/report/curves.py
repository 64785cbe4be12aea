"""Curves as SVG: drawn here, so that they follow the page's colors, stay sharp on any screen and need no
script.
"""

import math
from collections.abc import Mapping
from html import escape

import numpy as np

from fastgessl.report.records import Series

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
# More points than pixels say nothing.
MOST_POINTS = 400


def line_chart(
    title: str, series: Mapping[str, Series], unit: str = "", colors: Mapping[str, int] | None = None
) -> str:
    """A figure with a line for each named series of steps and values; `colors` gives each the number of its
    color.

    >>> line_chart("loss", {"run": ([1.0, 2.0], [3.0, 1.0])}).count("<polyline")
    1
    """
    drawn = {name: _thinned(*points) for name, points in series.items() if points[0]}
    caption = f"{escape(title)} {escape(unit)}"
    if not drawn:
        missing = '<p class="none">not logged in this run</p>'
        return f'<figure class="chart"><figcaption>{caption}</figcaption>{missing}</figure>'
    steps = np.concatenate([xs for xs, _ in drawn.values()])
    values = np.concatenate([ys for _, ys in drawn.values()])
    across = ticks(steps.min(), steps.max(), 4)
    down = ticks(values.min(), values.max(), 4)
    horizontal = (steps.min(), steps.max()), (LEFT, WIDTH - RIGHT)
    vertical = (down[0], down[-1]), (HEIGHT - BOTTOM, TOP)
    parts = ""
    for tick in down:
        y = np.interp(tick, *vertical)
        parts += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        parts += f'<text class="down" x="{LEFT - 6}" y="{y + 4:.1f}">{_number(tick)}</text>'
    for tick in across:
        if steps.min() <= tick <= steps.max():
            x = np.interp(tick, *horizontal)
            parts += f'<text class="across" x="{x:.1f}" y="{HEIGHT - 6}">{_number(tick)}</text>'
    for number, (name, (xs, ys)) in enumerate(drawn.items()):
        places = [
            f"{x:.1f},{y:.1f}"
            for x, y in zip(np.interp(xs, *horizontal), np.interp(ys, *vertical), strict=True)
        ]
        # One point alone is a line of no length, which round ends make a dot.
        line = " ".join(places if len(places) > 1 else 2 * places)
        color = (colors or {}).get(name, number) % 10
        parts += f'<polyline class="c{color}" points="{line}"><title>{escape(name)}</title></polyline>'
    if len(drawn) == 1:
        caption = f"{escape(title)} <b>{_number(values[-1])}</b> {escape(unit)}"
    label = f"{escape(title)} over steps"
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{parts}</svg>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{picture}</figure>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps.

    >>> ticks(0.2, 3.1, 4)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    raw = (high - low or abs(high) or 1.0) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step) * step
    last = max(1, math.ceil((high - first) / step - 1e-9))
    return [round(first + number * step, 12) for number in range(last + 1)]


def _thinned(xs: list[float], ys: list[float]) -> Series:
    """At most `MOST_POINTS` points: means of neighboring ones, the last kept as it is."""
    size = math.ceil(len(xs) / MOST_POINTS)
    starts = range(0, len(xs) - 1, size)
    steps, values = ([float(np.mean(each[at : at + size])) for at in starts] for each in (xs, ys))
    return [*steps, xs[-1]], [*values, ys[-1]]


def _number(value: float) -> str:
    """Short: 0.0123, 1,200, 3.2e-06."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
