"""The front against brute force, and its plot."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tritonsmith.compress.search.pareto import Point, dominates, front_of, plot_front, point_of


def point(name: str, size: int, latency: float, drop: float) -> Point:
    return Point(name=name, size_bytes=size, latency=latency, drop=drop)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_beats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = rng.integers(0, 5, (40, 3))  # few values, so that ties happen on every axis
    points = [point(str(index), *map(int, row)) for index, row in enumerate(axes)]
    expected = {
        str(one)
        for one in range(40)
        if not any(
            (axes[other] <= axes[one]).all() and (axes[other] < axes[one]).any() for other in range(40)
        )
    }
    assert {found.name for found in front_of(points)} == expected


def test_equal_points_both_stay_and_the_smallest_comes_first() -> None:
    points = [point("b", 2, 1.0, 0.0), point("a", 1, 1.0, 0.1), point("c", 2, 1.0, 0.0)]
    assert [found.name for found in front_of(points)] == ["a", "b", "c"]
    assert not dominates(points[0], points[2])


def test_a_speed_that_differs_by_noise_alone_beats_nothing() -> None:
    first = point_of("first", size_bytes=100, speed=1.234, drop=0.01)
    second = point_of("second", size_bytes=100, speed=1.217, drop=0.01)
    assert not dominates(first, second)
    assert dominates(point_of("third", size_bytes=100, speed=1.3, drop=0.01), second)


@pytest.mark.parametrize("points", [
    [point("fp32", 40_000, 1.0, 0.0)],
    [point("fp32", 40_000, 1.0, 0.0), point("beaten", 30_000, 1.1, 0.01), point("int8", 11_000, 0.4, 0.002)],
])  # fmt: skip
def test_the_plot_is_svg_that_names_the_front_by_number(points: list[Point]) -> None:
    svg = plot_front(
        points,
        marked=(points[-1].name, "chosen"),
        max_drop=0.01,
        size_at_most_bytes=20_000,
        metric="accuracy",
    )
    text = "".join(ET.fromstring(svg).itertext())  # noqa: S314
    assert "drop of accuracy" in text
    assert "times as fast as FP32" in text
    assert f"#{len(points)} chosen" in text
    assert "#2" not in text  # beaten by the third
