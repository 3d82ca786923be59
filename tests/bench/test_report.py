"""The report stands alone, says what was measured, and shows names as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritonsmith.bench.measure import SPLIT, BenchResult, Level
from tritonsmith.bench.plots import plot_latency, plot_split, plot_throughput
from tritonsmith.bench.report import write_bench, write_report

EVIL = "<script>alert(1)</script>&\"'"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would load, run and show; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset") or name.startswith("on"):
                self.loads.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def level_of(concurrency: int, unstable: str | None = None) -> Level:
    latencies = tuple(float(value) for value in range(1000 * concurrency, 1000 * concurrency + 101))
    p50, p90, p95, p99 = (float(value) for value in np.percentile(latencies, (50, 90, 95, 99)))
    return Level(
        concurrency=concurrency,
        throughput_per_s=1234.5 * concurrency,
        throughput_rounds=(1200.0 * concurrency, 1300.0 * concurrency),
        p50_us=p50,
        p90_us=p90,
        p95_us=p95,
        p99_us=p99,
        split_us={part: 100.0 + index for index, part in enumerate(SPLIT)},
        latencies_us=latencies,
        unstable=unstable,
    )


@pytest.fixture
def result() -> BenchResult:
    return BenchResult(
        model="digits",
        url="grpc://127.0.0.1:8001",
        protocol="grpc",
        batch_size=1,
        inputs="64 samples of evaluation.npz",
        inputs_sha256="abc",
        interval_ms=500,
        rounds=2,
        measured_at="2026-11-22T12:00:00+00:00",
        perf_analyzer="PATH",
        machine={"cpu": "A CPU", "cpu_count": 2, "system": "Linux"},
        levels=(level_of(1), level_of(4, "throughput of the rounds differs by 31%")),
    )


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def build_json(**changes: Any) -> dict[str, Any]:
    gate = {"metric": "accuracy", "candidate": 0.98, "drop": 0.002, "ci95_low": -0.001, "ci95_high": 0.004}
    candidate = {
        "name": "int8",
        "chosen": True,
        "gate": gate,
        "speed": {"ratio": 1.5},
        "bytes": 166_000,
        "refusal": None,
        "notes": ["a note"],
    }
    step = {"name": "quantize", "bytes_before": 620_000, "bytes_after": 166_000, "duration_s": 2.0}
    return {
        "name": "digits",
        "version": 3,
        "path": "/repository/digits/3",
        "source": "digits.h5",
        "candidates": [candidate],
        "steps": [step],
        "ledger": None,
        **changes,
    }


def validation_json(**changes: Any) -> dict[str, Any]:
    check = {
        "passed": True,
        "protocol": "grpc",
        "mode": "batched",
        "output": "probabilities",
        "against": "the source",
        "samples_count": 599,
        "values_count": 5990,
        "max_abs_error": 1.25e-6,
        "tolerance": 1e-4,
    }
    return {
        "model": "digits",
        "passed": True,
        "metric": {"metric": "accuracy", "baseline": 0.99, "candidate": 0.98, "samples": 599},
        "checks": [check],
        "notes": [],
        **changes,
    }


def test_a_benchmark_on_disk_holds_the_numbers_that_are_shown(result: BenchResult, tmp_path: Path) -> None:
    write_bench(result, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "bench.json",
        "report.html",
    ]
    stored = json.loads((tmp_path / "new" / "folder" / "bench.json").read_text())
    text = read_page(tmp_path / "new" / "folder" / "report.html").text
    for level in stored["levels"]:
        assert len(level["latencies_us"]) == 101
        for percentile in (50, 90, 95, 99):
            value = np.percentile(level["latencies_us"], percentile)
            assert value == pytest.approx(level[f"p{percentile}_us"])
            assert f"{value / 1000:.2f}" in text
        assert f"{level['throughput_per_s']:,.0f}" in text
    assert "unstable: throughput of the rounds differs by 31%" in text
    assert "the rounds differ by more than 10 %" in text
    assert "4 *" in text  # on the axis of the plots too
    assert "64 samples of evaluation.npz" in text
    assert "2 rounds of 3 windows of 500 ms" in text


def test_a_stable_benchmark_has_no_warning(result: BenchResult, tmp_path: Path) -> None:
    write_bench(replace(result, levels=(level_of(1),)), tmp_path)
    text = read_page(tmp_path / "report.html").text
    assert "unstable" not in text
    assert "1 *" not in text
    assert "* the rounds" not in text


def test_the_page_loads_and_runs_nothing(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(
        path,
        title="all",
        summary=[("accuracy", "0.98")],
        builds=[build_json()],
        validations=[validation_json()],
        benches=[result, result],
    )
    page = read_page(path)
    assert {"svg", "table", "style", "h1"} <= set(page.tags)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    # Inside a plot, # points to a shape of the plot itself.
    assert [load for load in page.loads if not load.startswith("#")] == []
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text
    assert re.findall(r"url\((?!#)[^)]*\)", text) == []


def test_what_is_built_and_proved_is_shown(tmp_path: Path) -> None:
    write_report(
        tmp_path / "report.html",
        title="digits",
        summary=[],
        builds=[build_json()],
        validations=[validation_json()],
    )
    text = read_page(tmp_path / "report.html").text
    for expected in (
        "accuracy 0.9800", "+0.0020", "-0.0010 to +0.0040", "1.50x", "a note", "166.0 kB", "620.0 kB",
        "3.73x", "passed", "accuracy through the endpoint: 0.98, before: 0.99, on 599 samples",
        "1.25e-06", "0.0001",
    ):  # fmt: skip
        assert expected in text


def test_a_ledger_is_shown_factor_by_factor(tmp_path: Path) -> None:
    first = {
        "step": "fp32",
        "size_bytes": 620_000,
        "parameters": 151_306,
        "flops": 2_700_000,
        "latency_ms": 0.04,
        "bytes_factor": 1.0,
        "parameters_factor": 1.0,
        "flops_factor": 1.0,
        "speed_factor": 1.0,
    }
    last = {**first, "step": "prune", "size_bytes": 31_000, "bytes_factor": 20.0, "speed_factor": 2.5}
    product = {"bytes_factor": 20.0, "parameters_factor": 1.0, "flops_factor": 1.0, "speed_factor": 2.5}
    ledger = {
        "engine": "onnxruntime",
        "batch_size": 1,
        "threads": 1,
        "entries": [first, last],
        "product": product,
    }
    write_report(tmp_path / "r.html", title="digits", summary=[], builds=[build_json(ledger=ledger)])
    text = read_page(tmp_path / "r.html").text
    for expected in ("31.0 kB", "20.00x", "151,306", "2.7 M", "2.50x", "product", "20.0x", "2.5x"):
        assert expected in text


def test_a_failure_is_shown_as_one(tmp_path: Path) -> None:
    failed = validation_json(passed=False, metric=None, notes=["look here"])
    failed["checks"][0] |= {"passed": False, "max_abs_error": 0.5}
    recorded = {**failed["checks"][0], "tolerance": None}
    failed["checks"].append(recorded)
    write_report(tmp_path / "report.html", title="digits", summary=[], validations=[failed])
    html = (tmp_path / "report.html").read_text()
    assert html.count('class="failed">FAILED<') == 2
    assert "recorded" in html
    assert "look here" in html
    assert "passed" not in read_page(tmp_path / "report.html").text


def test_names_are_text_and_no_markup(result: BenchResult, tmp_path: Path) -> None:
    evil = replace(
        result,
        model=EVIL,
        inputs=EVIL,
        machine={"cpu": EVIL, "cpu_count": 2, "system": EVIL},
        levels=(level_of(1, EVIL),),
    )
    check = validation_json()["checks"][0] | {"output": EVIL, "against": EVIL, "mode": EVIL}
    candidate = build_json()["candidates"][0] | {"name": EVIL, "notes": [EVIL]}
    step = build_json()["steps"][0] | {"name": EVIL}
    write_report(
        tmp_path / "report.html",
        title=EVIL,
        summary=[(EVIL, EVIL)],
        builds=[build_json(name=EVIL, path=EVIL, source=EVIL, candidates=[candidate], steps=[step])],
        validations=[validation_json(model=EVIL, checks=[check], notes=[EVIL])],
        benches=[evil],
    )
    page = read_page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 20  # each of the above, the title twice


def test_equal_data_gives_equal_plots(result: BenchResult) -> None:
    for plot in (plot_throughput, plot_latency, plot_split):
        first = plot(result)
        assert first.startswith("<svg")
        assert plot(replace(result)) == first
        assert plot(replace(result, levels=(level_of(1), level_of(8)))) != first


def test_plots_in_one_page_share_no_names(result: BenchResult, tmp_path: Path) -> None:
    """Ids are the page's: where two plots give one id to different shapes, the second is drawn wrong."""
    write_report(
        tmp_path / "report.html", title="two", summary=[], benches=[result, replace(result, model="b")]
    )
    text = (tmp_path / "report.html").read_text()
    shapes: dict[str, set[str]] = {}
    for name, body in re.findall(r'<clipPath id="([^"]+)">(.*?)</clipPath>', text, re.DOTALL):
        shapes.setdefault(name, set()).add(body)
    for name, body in re.findall(r'<path id="([^"]+)" (d=".*?")', text, re.DOTALL):
        shapes.setdefault(name, set()).add(body)
    assert shapes
    assert [name for name, bodies in shapes.items() if len(bodies) > 1] == []
