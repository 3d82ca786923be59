"""The page of a compression: complete, self-contained, names as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tritonsmith.compress.report import write_compress_report

EVIL = "<script>alert(1)</script>"


def gate(drop: float, *, passed: bool) -> dict[str, Any]:
    return {
        "metric": "accuracy", "higher_is_better": True, "baseline": 0.98, "candidate": 0.98 - drop,
        "drop": drop, "ci95_low": drop - 0.004, "ci95_high": drop + 0.004, "samples": 597, "max_drop": 0.01,
        "passed": passed, "certain": False, "reason": f"the drop is {drop}",
        "worst_class": {"label": EVIL, "samples": 61, "baseline": 0.99, "candidate": 0.91},
    }  # fmt: skip


def speed(ratio: float) -> dict[str, Any]:
    return {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "rounds": 101, "baseline_ms": 1.0,
            "candidate_ms": 1 / ratio, "batch_size": 1}  # fmt: skip


def entry(step: str, size: int, factor: float, latency: float) -> dict[str, Any]:
    return {"step": step, "size_bytes": size, "parameters": 123_456, "flops": 2_500_000,
            "latency_ms": latency, "bytes_factor": factor, "parameters_factor": 1.0, "flops_factor": 1.0,
            "speed_factor": factor}  # fmt: skip


def trial(name: str, size: int, drop: float, ratio: float, **changes: Any) -> dict[str, Any]:
    return {"name": name, "steps": [], "path": "model.onnx", "bytes": size, "parameters": 123_456,
            "flops": 2_500_000, "tuning": gate(drop, passed=True), "speed": speed(ratio), "evaluation": None,
            "misses": [], **changes}  # fmt: skip


def report_json(*, passed: bool = True) -> dict[str, Any]:
    """As `CompressReport.json` writes it; one step that quantized, mixed, found by a search."""
    layers = [
        {"node": "conv_1", "op": "Conv", "sqnr_db": 12.5, "drop": 0.03, "bytes": 640, "kept": True},
        {"node": "conv_2", "op": "Conv", "sqnr_db": 31.0, "drop": 0.0, "bytes": 18_432, "kept": False},
    ]
    step = {
        "name": "quantize-static", "options": {"calibrator": "minmax"}, "input_sha256": "a" * 64,
        "output_sha256": "b" * 64, "tools": {"onnx": "1.23"}, "duration_s": 2.5, "bytes_before": 400_000,
        "bytes_after": 100_000,
        "measured": {
            "int8_ops": 2, "ops": 3, "ops_by_type": {"QLinearConv": 2, "Conv": 1},
            "float_ops": [["conv_1", "Conv", "kept: it hurts"]], "float_ops_left_out": 4,
            "mixed": {"sensitivity": {"samples": 128, "metric": "accuracy", "layers": layers}},
        },
    }  # fmt: skip
    best = trial("quantize mixed=true", 100_000, 0.004, 2.5, evaluation=gate(0.005, passed=passed))
    machine = {"cpu": "A CPU", "cpu_count": 2, "system": "Linux"}
    return {
        "path": "out.onnx", "precision": "int8", "bytes": 100_000, "passed": passed, "duration_s": 60.0,
        "gate": gate(0.005, passed=passed),
        "ledger": {
            "engine": "onnxruntime", "batch_size": 1, "threads": 1,
            "entries": [entry("fp32", 400_000, 1.0, 1.0), entry("quantize-static", 100_000, 4.0, 0.4)],
            "product": {"bytes_factor": 4.0, "parameters_factor": 1.0, "flops_factor": 1.0,
                        "speed_factor": 2.5, "speed_low": 2.4, "speed_high": 2.6},
        },
        "candidates": [{"name": "1 quantize-static", "gate": gate(0.005, passed=passed), "speed": speed(2.5),
                        "notes": ["a note"]}],
        "search": {
            "goal": {"max_drop": 0.01, "size_at_most_bytes": 120_000, "speed_at_least": 2.0},
            "passed": passed, "best": best, "looks": 1, "missed": [] if passed else ["size: too much"],
            "trials": [trial("fp32", 400_000, 0.0, 1.0, misses=["size"]), best],
            "front": ["fp32", best["name"]],
            "skipped": [{"name": EVIL, "reason": "no data", "failed": False}],
            "blame": [{"step": "quantize", "bytes_before": 400_000, "bytes_after": 100_000, "drop": 0.004}],
            "next_steps": [] if passed else ["training data (--training)"], "ended": "complete",
            "tuned_on": "240 samples of training.npz", "machine": machine,
        },
        "steps": [step],
    }  # fmt: skip


@pytest.mark.parametrize("passed", [True, False])
def test_everything_that_was_measured_is_on_the_page(tmp_path: Path, passed: bool) -> None:
    path = tmp_path / "report.html"
    write_compress_report(path, json.loads(json.dumps(report_json(passed=passed))), title="digits")
    page = path.read_text(encoding="utf-8")
    text = re.sub(r"<[^>]*>", " ", page)
    for expected in (
        "4.0x", "400.0 kB", "123,456", "2.5 M", "0.4 ms", "2.40 to 2.60",  # the ledger
        "0.990 to 0.910 of 61", "+0.0050 (+0.0010 to +0.0090)", "a note",  # the gate
        "quantize mixed=true", "240 samples of training.npz", "at least 2 times as fast",  # the search
        "12.5", "18432", "floating point", "128 samples",  # sensitivity
        "2 of 3", "kept: it hurts", "and 4 more", "2 QLinearConv",  # the audit
        "calibrator minmax", "A CPU, 2 cores",
    ):  # fmt: skip
        assert expected in text, expected
    assert ("nothing keeps all bounds" in text) == (not passed)
    assert ("training data (--training)" in text) == (not passed)
    assert ("size: too much" in text) == (not passed)
    assert page.count("<svg") == 3


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_compress_report(path, report_json(), title=EVIL)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page


def test_without_a_search_and_without_a_gate_there_is_the_ledger(tmp_path: Path) -> None:
    record = report_json()
    record |= {"search": None, "gate": None, "passed": None}
    record["candidates"][0]["gate"] = None
    record["ledger"]["entries"] = record["ledger"]["entries"][:1]
    record["steps"][0]["measured"] = {}
    path = tmp_path / "report.html"
    write_compress_report(path, record, title="digits")
    page = path.read_text(encoding="utf-8")
    assert "The ledger" in page
    assert "The gate" not in page
    assert "The search" not in page
    assert "<svg" not in page
