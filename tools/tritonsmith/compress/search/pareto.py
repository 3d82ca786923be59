"""What no other model beats in all of bytes, latency and accuracy, as a front and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tritonsmith import drawing

COLOURS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model on three axes; less is better on each."""

    name: str
    size_bytes: int
    latency: float  # of one run, as a share of FP32's
    drop: float  # how much worse the metric is than FP32's

    @property
    def axes(self) -> tuple[float, float, float]:
        return self.size_bytes, self.latency, self.drop


def point_of(name: str, *, size_bytes: int, speed: float, drop: float) -> Point:
    """A point from what was measured; of a speed two digits count, the rest of them are noise."""
    return Point(name=name, size_bytes=size_bytes, latency=1 / float(f"{speed:.2g}"), drop=drop)


def dominates(first: Point, second: Point) -> bool:
    """Whether `first` is nowhere worse than `second`, and better on one axis at least."""
    pairs = list(zip(first.axes, second.axes, strict=True))
    return all(one <= other for one, other in pairs) and any(one < other for one, other in pairs)


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other dominates, smallest first; of equal points all stay.

    After sorting, only an earlier point can dominate a later one.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: point.axes):
        if not any(dominates(other, point) for other in front):
            front.append(point)
    return tuple(front)


def plot_front(
    points: Sequence[Point],
    *,
    marked: tuple[str, str],
    max_drop: float,
    size_at_most_bytes: int | None,
    metric: str,
) -> str:
    """Drop over bytes as SVG text; the colour is the speed, and what lies on the front carries its number.

    Numbers are places in `points`, from 1, as in the table beside the plot. `marked` is the name of one and
    the word that marks it. Dashed lines are the bounds.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = drawing.figure("Bytes, accuracy and speed", "kB (logarithmic)", f"drop of {metric}")
    from matplotlib import colormaps  # after `figure`, which says how to get it

    front = {point.name for point in front_of(points)}
    speeds = [1 / point.latency for point in points]
    dots = axes.scatter(
        [point.size_bytes / 1000 for point in points],
        [point.drop for point in points],
        c=speeds,
        s=[70 if point.name in front else 26 for point in points],
        cmap=colormaps["viridis"].resampled(COLOURS),  # few enough to be drawn as shapes, not as an image
        norm="log" if max(speeds) > 2 * min(speeds) else None,
        edgecolors=[drawing.INK if point.name in front else "none" for point in points],
        zorder=3,
    )
    axes.set_xscale("log")
    drawing.label_decades(axes.xaxis, [point.size_bytes / 1000 for point in points])
    axes.axhline(max_drop, color=drawing.COLOURS[2], linestyle="--", linewidth=1.2)
    if size_at_most_bytes is not None:
        axes.axvline(size_at_most_bytes / 1000, color=drawing.COLOURS[2], linestyle="--", linewidth=1.2)
    for number, point in enumerate(points, 1):
        is_marked = point.name == marked[0]
        if point.name in front or is_marked:
            axes.annotate(
                f"#{number} {marked[1]}" if is_marked else f"#{number}",
                (point.size_bytes / 1000, point.drop),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8,
                fontweight="bold" if is_marked else "normal",
            )
    bar = figure.colorbar(dots, ax=axes, pad=0.02)
    bar.set_label("times as fast as FP32", color=drawing.INK)
    if max(speeds) > 2 * min(speeds):
        drawing.label_decades(bar.ax.yaxis, speeds)
    axes.margins(x=0.08, y=0.1)
    return drawing.svg_of(figure)
