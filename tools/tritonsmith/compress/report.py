"""A self-contained HTML report of a compression: what each step did, what it cost, and what was tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tritonsmith import drawing, html
from tritonsmith.compress.int8.sensitivity import ROW_COLUMNS as LAYER_COLUMNS
from tritonsmith.compress.int8.sensitivity import plot_sensitivity, sensitivity_from_json, sensitivity_rows
from tritonsmith.compress.search.outcome import ROW_COLUMNS, drop_text, trial_rows
from tritonsmith.compress.search.pareto import plot_front, point_of
from tritonsmith.console import human_bytes
from tritonsmith.files import write_text_atomically
from tritonsmith.rows import LEDGER_COLUMNS, ledger_rows

Record = Mapping[str, Any]
GATE_COLUMNS = ("", "after", "metric", "drop (95 % interval)", "worst class", "speed", "why")
MOST_FLOAT_OPS = 40


def write_compress_report(path: Path, report: Record, *, title: str) -> None:
    """Write the page from the JSON form of a `CompressReport`. Nothing is loaded from elsewhere.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    search = report.get("search")
    if search is not None:
        machine = search["machine"]
        parts.append(html.soft(f"{machine['cpu']}, {machine['cpu_count']} cores, {machine['system']}"))
    parts.append(html.tiles(_summary(report)))
    parts += _ledger_section(report["ledger"])
    parts += _gate_section(report)
    if search is not None:
        parts += _search_section(search)
    for step in report["steps"]:
        parts += _sensitivity_section(step)
        parts += _audit_section(step)
    parts += _lineage_section(report["steps"])
    write_text_atomically(path, html.page(title, parts))


def _summary(report: Record) -> Iterator[tuple[str, str]]:
    product, entries, gate = report["ledger"]["product"], report["ledger"]["entries"], report["gate"]
    yield (
        f"smaller: {human_bytes(entries[0]['size_bytes'])} to {human_bytes(report['bytes'])}",
        (f"{product['bytes_factor']:.1f}x"),
    )
    yield (
        f"as fast, 95 % interval {product['speed_low']:.2f} to {product['speed_high']:.2f}",
        f"{product['speed_factor']:.2f}x",
    )
    yield "fewer FLOPs", f"{product['flops_factor']:.1f}x"
    if gate is not None and gate["drop"] is not None:
        yield f"{gate['metric']}, {html.number(gate['baseline'])} before", html.number(gate["candidate"])
        yield "the drop on the evaluation data", f"{gate['drop']:+.4f}"
    if report["passed"] is not None:
        yield "all bounds", "kept" if report["passed"] else "NOT kept"


def _ledger_section(ledger: Record) -> Iterator[str]:
    yield "<h2>The ledger</h2>"
    yield html.soft(
        f"Measured on the written files, latency on {ledger['engine']}, batch {ledger['batch_size']}, "
        f"{ledger['threads']} thread. Each factor is against the line above."
    )
    yield html.table(LEDGER_COLUMNS, ledger_rows(ledger), total=True)
    if len(ledger["entries"]) > 1:
        yield html.plots([plot_ledger(ledger)])


def plot_ledger(ledger: Record) -> str:
    """What each step leaves of FP32's bytes, FLOPs and latency, as bars in SVG text."""
    figure, axes = drawing.figure("What is left after each step", "", "% of FP32 (logarithmic)")
    entries = ledger["entries"]
    ticks = np.arange(len(entries))
    drawn: list[float] = []
    parts = (("size_bytes", "bytes", 4), ("flops", "FLOPs", 5), ("latency_ms", "latency", 2))
    for index, (key, label, colour) in enumerate(parts):
        shares = [100 * entry[key] / entries[0][key] if entries[0][key] else 100.0 for entry in entries]
        drawn += shares
        places = ticks + (index - 1) * 0.27
        axes.bar(places, shares, width=0.25, color=drawing.COLOURS[colour], label=label)
        for place, share in zip(places, shares, strict=True):
            axes.annotate(
                f"{share:.3g}", (place, share), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    axes.set_yscale("log")
    drawing.label_decades(axes.yaxis, drawn)
    axes.set_xticks(ticks, [entry["step"] for entry in entries])
    axes.set_ylim(min(drawn) / 2, max(drawn) * 1.6)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    return drawing.svg_of(figure)


def _gate_section(report: Record) -> Iterator[str]:
    judged = [candidate for candidate in report["candidates"] if candidate["gate"] is not None]
    if not judged:
        return
    gate = judged[-1]["gate"]
    yield "<h2>The gate</h2>"
    budget = "without a budget" if gate["max_drop"] is None else f"budget {gate['max_drop']:g}"
    yield html.soft(
        f"{gate['metric']} on {gate['samples']} evaluation samples, {budget}; the interval is that of the "
        "drop, from a paired bootstrap"
    )
    rows = []
    for candidate in judged:
        gate, speed = candidate["gate"], candidate["speed"]
        rows.append(
            (
                "ok" if gate["passed"] else "FAILED",
                candidate["name"],
                html.number(gate["candidate"]),
                drop_text(gate),
                _worst(gate),
                "-" if speed is None else f"{speed['ratio']:.2f}x",
                "; ".join([gate["reason"], *candidate["notes"]]),
            )
        )
    yield html.table(GATE_COLUMNS, rows)


def _search_section(search: Record) -> Iterator[str]:
    best, goal = search["best"], search["goal"]
    verdict = ("ok", "found") if search["passed"] else ("failed", "nothing keeps all bounds")
    yield f'<h2>The search <span class="{verdict[0]}">{verdict[1]}</span></h2>'
    measured, failed = len(search["trials"]) - 1, sum(skip["failed"] for skip in search["skipped"])
    yield html.soft(
        f"{_goal_text(goal)}. {measured} candidates measured beside FP32, {failed} could not be had, "
        f"{len(search['skipped']) - failed} left out; {search['ended']}. Chosen on {search['tuned_on']}; "
        f"the evaluation data then judged {search['looks']} of them."
    )
    for line in search["missed"]:
        yield f'<p><span class="failed">missed</span> {escape(line)}</p>'
    if search["next_steps"]:
        items = "".join(f"<li>{escape(step)}</li>" for step in search["next_steps"])
        yield f"<p>What to do next:</p><ul>{items}</ul>"
    rows = [
        (blame["step"], human_bytes(blame["bytes_before"]), human_bytes(blame["bytes_after"]),
         f"{blame['bytes_before'] / blame['bytes_after']:.2f}x", f"{blame['drop']:+.4f}")
        for blame in search["blame"]
    ]  # fmt: skip
    if rows:
        yield f"<h3>Which step costs what: {escape(best['name'])}</h3>"
        yield html.table(("step", "bytes before", "bytes after", "smaller", "adds to the drop"), rows)
    yield "<h3>All candidates, and the front of bytes, latency and accuracy</h3>"
    points = [
        point_of(trial["name"], size_bytes=trial["bytes"], speed=trial["speed"]["ratio"],
                 drop=trial["tuning"]["drop"])
        for trial in search["trials"]
    ]  # fmt: skip
    plot = plot_front(
        points,
        marked=(best["name"], "chosen" if search["passed"] else "nearest"),
        max_drop=goal["max_drop"],
        size_at_most_bytes=goal["size_at_most_bytes"],
        metric=best["tuning"]["metric"],
    )
    yield html.plots([plot])
    yield html.table(ROW_COLUMNS, trial_rows(search))
    if search["skipped"]:
        yield "<h3>What was left out, and why</h3>"
        left_out = [(skip["name"], "cannot be had" if skip["failed"] else "left out", skip["reason"])
                for skip in search["skipped"]]  # fmt: skip
        yield html.table(("what", "", "why"), left_out)


def _sensitivity_section(step: Record) -> Iterator[str]:
    found = _find(step["measured"], "sensitivity")
    if found is None:
        return
    sensitivity = sensitivity_from_json(found)
    yield f"<h2>Sensitivity by layer: {escape(step['name'])}</h2>"
    yield html.soft(
        f"Each layer alone in INT8, all others in floating point, on {sensitivity.samples} samples; "
        "fewer decibels hurt more"
    )
    yield html.plots([plot_sensitivity(sensitivity)])
    yield html.table(LAYER_COLUMNS, sensitivity_rows(sensitivity))


def _audit_section(step: Record) -> Iterator[str]:
    measured = step["measured"]
    if "int8_ops" not in measured:
        return
    yield f"<h2>What runs in INT8: {escape(step['name'])}</h2>"
    kinds = ", ".join(f"{count} {kind}" for kind, count in measured["ops_by_type"].items())
    yield (
        f"<p><b>{measured['int8_ops']} of {measured['ops']}</b> convolutions and matrix products run in "
        f'INT8, read from the graph that the engine built <span class="soft">({escape(kinds)})</span></p>'
    )
    floats: Sequence[Sequence[str]] = measured.get("float_ops", ())
    if floats:
        yield html.table(("node", "operator", "why not"), [tuple(row) for row in floats[:MOST_FLOAT_OPS]])
    more = max(0, len(floats) - MOST_FLOAT_OPS) + measured.get("float_ops_left_out", 0)
    if more > 0:
        yield html.soft(f"and {more} more")


def _lineage_section(steps: Sequence[Record]) -> Iterator[str]:
    yield "<h2>Lineage</h2>"
    rows = [
        (
            step["name"],
            ", ".join(f"{name} {_plain(value)}" for name, value in step["options"].items()),
            ", ".join(f"{name} {version}" for name, version in step["tools"].items()),
            f"{step['duration_s']:.1f} s",
            step["output_sha256"][:12],
        )
        for step in steps
    ]
    yield html.table(("step", "options", "tools", "time", "SHA-256"), rows)


def _find(record: object, key: str) -> Any:
    """The first value under `key`, however deep; steps nest what their parts measured."""
    if not isinstance(record, Mapping):
        return None
    if record.get(key) is not None:
        return record[key]
    return next((found for value in record.values() if (found := _find(value, key)) is not None), None)


def _worst(gate: Record) -> str:
    worst = gate["worst_class"]
    if worst is None:
        return "-"
    return f"{worst['label']}: {worst['baseline']:.3f} to {worst['candidate']:.3f} of {worst['samples']}"


def _goal_text(goal: Record) -> str:
    parts = [f"Looking for a drop of at most {goal['max_drop']:g}"]
    if goal["size_at_most_bytes"] is not None:
        parts.append(f"at most {human_bytes(goal['size_at_most_bytes'])}")
    if goal["speed_at_least"] is not None:
        parts.append(f"at least {goal['speed_at_least']:g} times as fast")
    return ", ".join(parts) + ("" if len(parts) > 1 else ", as small as possible")


def _plain(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
