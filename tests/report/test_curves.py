import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from fastgessl.report.curves import HEIGHT, LEFT, RIGHT, WIDTH, line_chart, ticks


def drawn_points(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]
        for line in re.findall(r'points="([^"]+)"', chart)
    ]


def test_a_line_goes_through_its_points_between_the_axes():
    (points,) = drawn_points(line_chart("loss", {"run": ([0.0, 10.0, 20.0], [4.0, 0.0, 2.0])}))

    assert [x for x, _ in points] == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT])
    heights = [y for _, y in points]
    assert heights[0] < heights[2] < heights[1] <= HEIGHT
    assert (heights[1] - heights[2]) == pytest.approx(heights[2] - heights[0], abs=0.2)


def test_a_long_series_keeps_its_mean_and_its_last_point():
    values = [math.sin(step / 50) for step in range(5000)]

    (points,) = drawn_points(line_chart("x", {"run": ([float(step) for step in range(5000)], values)}))

    assert len(points) <= 401
    assert points[-1][0] == pytest.approx(WIDTH - RIGHT)


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 3.1), (-4e-7, 9e-7), (5.0, 5.0), (0.0, 0.0), (-3.0, 1234567.0)]
)
def testticks_are_even_and_enclose_the_values(low, high):
    found = ticks(low, high, 4)

    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))


@pytest.mark.parametrize("values", [([1.0], [2.0]), ([1.0, 2.0], [3.0, 3.0]), ([], [])])
def test_one_point_a_constant_and_nothing_are_well_formed_pictures(values):
    chart = line_chart("σ & <b>", {"a<script>": values})

    ElementTree.fromstring(chart)
    assert "<script" not in chart and "nan" not in chart
    assert ("not logged" in chart) == (not values[0])
