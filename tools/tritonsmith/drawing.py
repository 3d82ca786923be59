"""What all plots share: matplotlib without a display, one look, SVG text to stand inside an HTML page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from tritonsmith.errors import MissingExtraError

INK = "#1f2933"
GRID = "#d9dee4"
# Colour-blind safe (Okabe and Ito, 2008).
COLOURS = ("#999999", "#56b4e9", "#e69f00", "#f0e442", "#0072b2", "#009e73", "#cc79a7")
SIZE_INCHES = (6.4, 3.6)


def figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
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


def label_decades(axis: Any, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis, more of them where it spans less than a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    decades = math.log10(max(values) / min(values))
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def svg_of(figure: Any) -> str:
    import matplotlib as mpl

    stream = io.StringIO()
    # Text stays text (small, searchable); no date, so that equal data gives equal bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tritonsmith", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
