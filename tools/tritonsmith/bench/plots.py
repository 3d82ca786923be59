"""Plots of a benchmark as SVG text, to stand inside an HTML page."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from tritonsmith.bench.measure import SPLIT, BenchResult
from tritonsmith.errors import MissingExtraError

INK = "#1f2933"
GRID = "#d9dee4"
# Colour-blind safe (Okabe and Ito, 2008), one a part of the split.
COLOURS = ("#999999", "#56b4e9", "#e69f00", "#f0e442", "#0072b2", "#009e73", "#cc79a7")
SIZE_INCHES = (6.4, 3.6)


def plot_throughput(result: BenchResult) -> str:
    """Inferences per second over concurrency; each round is a dot."""
    figure, axes = _figure("Throughput", "concurrency", "inferences / s")
    ticks = range(len(result.levels))
    axes.plot(ticks, [level.throughput_per_s for level in result.levels], color=COLOURS[4], linewidth=2)
    for tick, level in zip(ticks, result.levels, strict=True):
        axes.scatter([tick] * len(level.throughput_rounds), level.throughput_rounds, color=COLOURS[4], s=14)
    axes.set_ylim(bottom=0)
    _label_levels(axes, result)
    return _svg(figure)


def plot_latency(result: BenchResult) -> str:
    """Latency percentiles over concurrency, in milliseconds."""
    figure, axes = _figure("Latency", "concurrency", "ms")
    ticks = range(len(result.levels))
    for name, colour in (("p50", COLOURS[5]), ("p90", COLOURS[1]), ("p99", COLOURS[2])):
        values = [getattr(level, f"{name}_us") / 1000 for level in result.levels]
        axes.plot(ticks, values, label=name, color=colour, linewidth=2, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _label_levels(axes, result)
    return _svg(figure)


def plot_split(result: BenchResult) -> str:
    """Where an average request spends its time, stacked over concurrency, in milliseconds."""
    figure, axes = _figure("Where the time goes (average request)", "concurrency", "ms")
    ticks = np.arange(len(result.levels))
    bottom = np.zeros(len(ticks))
    for part, colour in zip(SPLIT, COLOURS, strict=True):
        values = np.array([level.split_us[part] / 1000 for level in result.levels])
        label = part.removesuffix("_us").replace("_", " ")
        axes.bar(ticks, values, bottom=bottom, width=0.6, color=colour, label=label)
        bottom += values
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper left")
    _label_levels(axes, result)
    return _svg(figure)


def _figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib", package="matplotlib", extra="report") from error
    # Figure without pyplot: no global state, no display.
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label_levels(axes: Any, result: BenchResult) -> None:
    labels = [f"{level.concurrency}{' *' if level.unstable else ''}" for level in result.levels]
    axes.set_xticks(range(len(labels)), labels)


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    stream = io.StringIO()
    # Text stays text (small, searchable); no date, so that equal data gives equal bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tritonsmith", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
