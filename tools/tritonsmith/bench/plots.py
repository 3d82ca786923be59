"""Plots of a benchmark as SVG text, to stand inside an HTML page."""

from __future__ import annotations

from typing import Any

import numpy as np

from tritonsmith import drawing
from tritonsmith.bench.measure import SPLIT, BenchResult


def plot_throughput(result: BenchResult) -> str:
    """Inferences per second over concurrency; each round is a dot."""
    figure, axes = drawing.figure("Throughput", "concurrency", "inferences / s")
    ticks = range(len(result.levels))
    axes.plot(
        ticks, [level.throughput_per_s for level in result.levels], color=drawing.COLOURS[4], linewidth=2
    )
    for tick, level in zip(ticks, result.levels, strict=True):
        axes.scatter(
            [tick] * len(level.throughput_rounds), level.throughput_rounds, color=drawing.COLOURS[4], s=14
        )
    axes.set_ylim(bottom=0)
    _label_levels(axes, result)
    return drawing.svg_of(figure)


def plot_latency(result: BenchResult) -> str:
    """Latency percentiles over concurrency, in milliseconds."""
    figure, axes = drawing.figure("Latency", "concurrency", "ms")
    ticks = range(len(result.levels))
    for name, colour in (
        ("p50", drawing.COLOURS[5]),
        ("p90", drawing.COLOURS[1]),
        ("p99", drawing.COLOURS[2]),
    ):
        values = [getattr(level, f"{name}_us") / 1000 for level in result.levels]
        axes.plot(ticks, values, label=name, color=colour, linewidth=2, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _label_levels(axes, result)
    return drawing.svg_of(figure)


def plot_split(result: BenchResult) -> str:
    """Where an average request spends its time, stacked over concurrency, in milliseconds."""
    figure, axes = drawing.figure("Where the time goes (average request)", "concurrency", "ms")
    ticks = np.arange(len(result.levels))
    bottom = np.zeros(len(ticks))
    for part, colour in zip(SPLIT, drawing.COLOURS, strict=True):
        values = np.array([level.split_us[part] / 1000 for level in result.levels])
        label = part.removesuffix("_us").replace("_", " ")
        axes.bar(ticks, values, bottom=bottom, width=0.6, color=colour, label=label)
        bottom += values
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper left")
    _label_levels(axes, result)
    return drawing.svg_of(figure)


def _label_levels(axes: Any, result: BenchResult) -> None:
    labels = [f"{level.concurrency}{' *' if level.unstable else ''}" for level in result.levels]
    axes.set_xticks(range(len(labels)), labels)
