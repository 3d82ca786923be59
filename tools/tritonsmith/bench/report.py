"""A self-contained HTML report of a deployment: what was built, how it was proved, how fast it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tritonsmith import html
from tritonsmith.bench import plots
from tritonsmith.bench.measure import BenchResult
from tritonsmith.console import human_bytes
from tritonsmith.files import write_text_atomically
from tritonsmith.rows import CANDIDATE_COLUMNS, LEDGER_COLUMNS, candidate_rows, ledger_rows

REPORT, RESULTS = "report.html", "bench.json"


def write_report(
    path: Path,
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    builds: Sequence[Mapping[str, Any]] = (),
    validations: Sequence[Mapping[str, Any]] = (),
    benches: Sequence[BenchResult] = (),
) -> None:
    """Write the page; `builds` and `validations` are the JSON forms of their reports.

    `summary` holds (what, value) for the tiles on top. Nothing is loaded from elsewhere.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if benches:
        machine = benches[0].machine
        parts.append(
            f'<p class="soft">{escape(str(machine["cpu"]))}, {machine["cpu_count"]} cores, '
            f"{escape(str(machine['system']))}; {escape(benches[0].measured_at)}</p>"
        )
    parts.append(html.tiles(summary))
    for build in builds:
        parts += _build_section(build)
    for validation in validations:
        parts += _validation_section(validation)
    for result in benches:
        parts += _bench_section(result)
    write_text_atomically(path, html.page(title, parts))


def write_bench(result: BenchResult, folder: Path) -> None:
    """Write bench.json, raw samples included, and report.html into `folder`, over what is there."""
    write_report(
        folder / REPORT,
        title=f"{result.model}: benchmark",
        summary=bench_summary(result),
        benches=[result],
    )
    write_text_atomically(folder / RESULTS, json.dumps(result.json(raw=True), indent=1) + "\n")


def bench_summary(result: BenchResult) -> list[tuple[str, str]]:
    """The tiles of a benchmark: latency alone on the server, and the most that it answered."""
    first, best = result.levels[0], result.best()
    return [
        (f"p50 at concurrency {first.concurrency}", f"{first.p50_us / 1000:.2f} ms"),
        (f"p99 at concurrency {first.concurrency}", f"{first.p99_us / 1000:.2f} ms"),
        (f"most inferences/s, at concurrency {best.concurrency}", f"{best.throughput_per_s:,.0f}"),
    ]


def _build_section(build: Mapping[str, Any]) -> list[str]:
    parts = [f"<h2>Built: {escape(build['name'])} version {build['version']}</h2>"]
    parts.append(f'<p class="soft">from {escape(build["source"])} to {escape(build["path"])}</p>')
    if build["candidates"]:
        parts.append(html.table(CANDIDATE_COLUMNS, candidate_rows(build)))
    if build["ledger"] is not None:
        parts.append(html.table(LEDGER_COLUMNS, ledger_rows(build["ledger"]), total=True))
    steps = [
        (
            step["name"],
            human_bytes(step["bytes_before"]),
            human_bytes(step["bytes_after"]),
            f"{step['bytes_before'] / step['bytes_after']:.2f}x",
            f"{step['duration_s']:.1f} s",
        )
        for step in build["steps"]
        if step["bytes_after"]  # an ensemble has no file of its own
    ]
    if steps:
        parts.append(html.table(("step", "bytes before", "bytes after", "factor", "time"), steps))
    return parts


def _validation_section(validation: Mapping[str, Any]) -> list[str]:
    verdict = ("ok", "passed") if validation["passed"] else ("failed", "FAILED")
    parts = [
        f'<h2>Validated: {escape(validation["model"])} <span class="{verdict[0]}">{verdict[1]}</span></h2>'
    ]
    metric = validation["metric"]
    if metric is not None:
        parts.append(
            f"<p>{escape(metric['metric'])} through the endpoint: {html.number(metric['candidate'])}, "
            f"before: {html.number(metric['baseline'])}, on {metric['samples']} samples</p>"
        )
    rows = [
        (
            "recorded" if check["tolerance"] is None else "ok" if check["passed"] else "FAILED",
            check["protocol"],
            check["mode"],
            check["output"],
            check["against"],
            str(check["samples_count"]),
            str(check["values_count"]),
            html.number(check["max_abs_error"]),
            "-" if check["tolerance"] is None else html.number(check["tolerance"]),
        )
        for check in validation["checks"]
    ]
    columns = ("", "over", "mode", "output", "against", "samples", "values", "largest error", "tolerance")
    parts.append(html.table(columns, rows))
    parts += [html.soft(note) for note in validation["notes"]]
    return parts


def _bench_section(result: BenchResult) -> list[str]:
    parts = [
        f"<h2>Measured: {escape(result.model)}</h2>",
        f'<p class="soft">perf_analyzer over {escape(result.protocol)}, batch {result.batch_size}, '
        f"{escape(result.inputs)}; {result.rounds} rounds of 3 windows of {result.interval_ms} ms</p>",
    ]
    rows = [
        (
            str(level.concurrency),
            f"{level.throughput_per_s:,.0f}",
            f"{min(level.throughput_rounds):,.0f} to {max(level.throughput_rounds):,.0f}",
            *(f"{value / 1000:.2f}" for value in (level.p50_us, level.p90_us, level.p95_us, level.p99_us)),
            f"unstable: {level.unstable}" if level.unstable else "",
        )
        for level in result.levels
    ]
    columns = ("concurrency", "inferences/s", "rounds", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "")
    parts.append(html.table(columns, rows))
    drawn = (plots.plot_throughput(result), plots.plot_latency(result), plots.plot_split(result))
    parts.append(html.plots(drawn))
    parts += [html.soft(note) for note in result.notes]
    if any(level.unstable for level in result.levels):
        parts.append('<p class="soft">* the rounds differ by more than 10 %</p>')
    return parts
