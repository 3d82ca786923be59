"""The GPU benchmark without a GPU: how samples become numbers, how it asks, and that it refuses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "perf" / "gpu"))
import compare
from compare import COMPILING, Bench
from reference import agreement, read_weights
from subjects import Row, Subject, int8_verdicts, summary_of
from worker import Worker, WorkerError

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "perf" / "gpu"
# A process that answers: twice the number, a refusal, nothing for a minute, or its end.
PEER = """
import sys, time
sys.path.append(sys.argv[1])
from worker import answer_requests, WorkerError
def double(number):
    print("a library prints")
    return {"number": 2 * number}
def refuse():
    raise WorkerError("not here")
answer_requests(
    {"double": double, "refuse": refuse, "sleep": lambda: time.sleep(60), "end": lambda: sys.exit(7)},
    (WorkerError,),
)
"""


# In place of all three processes: INT8 takes 0.9 of FP16's time on resnet50 and all of it on minilm, one way
# to run does not work, and one plan cannot be built.
MEASURERS = """
import sys
sys.path.append(sys.argv[1])
from worker import answer_requests, WorkerError
def facts():
    return {"gpu": {"gpu": "NVIDIA Paper 1"}, "tensorrt": "8.6.0"}
def build(model, precision):
    if (model, precision) == ("minilm", "fp32"):
        raise WorkerError("out of memory")
    return {"size_bytes": 1000, "kept": False}
def prepare(model, precision, mode, batch):
    if mode == "compile":
        raise WorkerError("compile does not run: no C compiler")
    return {"agreement": {"y": {"min_cosine": 1.0}}, "prepare_s": 0.5}
def time(model, precision, mode, batch, *, clock, runs, warmup):
    us = 900 if (model, precision) == ("resnet50", "int8") else 1000
    return {"ns": [us * 1000 * batch] * runs}
answer_requests({"facts": facts, "build": build, "prepare": prepare, "time": time}, (WorkerError,))
"""


@pytest.fixture
def peer() -> Iterator[Worker]:
    worker = Worker("peer", [sys.executable, "-c", PEER, str(BENCH)], os.environ)
    yield worker
    worker.close()


def test_worker_answers_and_refuses(peer: Worker) -> None:
    assert peer.ask("double", timeout_s=30, number=21) == {"number": 42}
    with pytest.raises(WorkerError, match="WorkerError: not here"):
        peer.ask("refuse", timeout_s=30)
    assert peer.ask("double", timeout_s=30, number=1) == {"number": 2}


def test_a_worker_that_hangs_is_ended(peer: Worker) -> None:
    peer.ask("double", timeout_s=30, number=1)
    with pytest.raises(WorkerError, match="no answer within 0 s"):
        peer.ask("sleep", timeout_s=0.1)
    with pytest.raises(WorkerError, match="peer has ended"):
        peer.ask("double", timeout_s=30, number=1)


def test_a_worker_that_ends_is_reported(peer: Worker) -> None:
    with pytest.raises(WorkerError, match="peer ended with exit status 7"):
        peer.ask("end", timeout_s=30)


def test_percentiles_are_those_of_all_samples() -> None:
    rounds = [list(range(1000, 101_000, 1000)), [50_000] * 3]  # 1 to 100 us, then three of 50 us
    summary = summary_of(rounds, batch=4)
    assert summary["p50_us"] == 50.0
    assert summary["p99_us"] == 99.0  # of 103 samples the 102nd
    assert summary["per_s"] == pytest.approx(80_000.0)
    assert summary["rounds_p50_us"] == [50.5, 50.0]
    assert summary["spread"] == pytest.approx(0.5 / 50.25)
    assert summary["rounds_ns"] == rounds
    assert summary_of([], batch=1)["p50_us"] is None


def row_of(precision: str, batch: int, *rounds_us: int) -> Row:
    subject = Subject(engine="tensorrt", precision=precision, mode="graph")
    row = Row(subject=subject, model="resnet50", batch=batch, unmeasured=None)
    row.rounds_ns["gpu"] = [[us * 1000] * 5 for us in rounds_us]
    return row


def test_int8_that_is_no_faster_is_said() -> None:
    rows = [
        *(row_of("fp16", 1, 100, 102, 98), row_of("int8", 1, 100, 100, 100)),
        *(row_of("fp16", 8, 200, 200, 200), row_of("int8", 8, 100, 125, 100)),
        *(row_of("fp16", 32, 200, 200, 200), row_of("int8", 32, 100, 210, 100)),  # slower in a round
        row_of("int8", 128, 100),  # nothing to compare with
    ]
    verdicts = {verdict["batch"]: verdict for verdict in int8_verdicts(rows)}
    assert {batch: verdict["faster"] for batch, verdict in verdicts.items()} == {1: False, 8: True, 32: False}
    assert verdicts[8]["int8_as_fast_as_fp16"] == 2.0
    assert (verdicts[8]["low"], verdicts[8]["high"]) == (1.6, 2.0)


def test_agreement_is_the_worst_row() -> None:
    expected = {"y": np.array([[1.0, 0.0], [3.0, 4.0]], np.float32)}
    found = {"y": np.array([[1.0, 0.0], [4.0, 3.0]], np.float32)}
    assert agreement(expected, found) == {
        "y": {"max_abs": 1.0, "largest": 4.0, "min_cosine": pytest.approx(24 / 25)}
    }


def test_weights_are_read_out_of_the_onnx_file(tmp_path: Path) -> None:
    from gpu.models import find_places

    random = np.random.default_rng(0)
    weights = {
        "bias": random.normal(size=5).astype(np.float32),
        "matrix": random.normal(size=(3, 5)).astype(np.float32),
        "kernel": random.normal(size=(4, 3, 1, 1)).astype(np.float32),
    }
    stored = (weights["kernel"], weights["matrix"].T, weights["bias"])  # a product's weights lie transposed
    content = b"head" + b"--".join(np.ascontiguousarray(array).tobytes() for array in stored)
    (tmp_path / "fp32.onnx").write_bytes(content)
    places = {
        name: {"offset_bytes": place.offset_bytes, "shape": place.shape, "transposed": place.transposed}
        for name, place in find_places(tmp_path / "fp32.onnx", weights)
    }
    assert {name for name, place in places.items() if place["transposed"]} == {"matrix"}
    (tmp_path / "model.json").write_text(json.dumps({"weights": places}))
    found = read_weights(tmp_path)
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


def test_benchmark_refuses_without_a_gpu(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, str(BENCH / "compare.py"), "--models", str(tmp_path), "--plans", str(tmp_path)),
            *("--out", str(tmp_path / "gpu.json"), "--torch-python", sys.executable),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("benchmark: no GPU: ")
    assert not (tmp_path / "gpu.json").exists()


def run_with_measurers(folder: Path) -> Any:
    """The result of a whole run, with MEASURERS in place of the processes that measure."""
    for name in ("resnet50", "minilm"):
        (folder / name).mkdir()
        description = {"opset": 17, "files": {}, "int8_step": {}, "measured": {}, "weights": {}}
        (folder / name / "model.json").write_text(json.dumps(description))
    out = folder / "gpu.json"
    options = argparse.Namespace(models=folder, plans=folder, out=out, minutes=5.0)
    command = [sys.executable, "-c", MEASURERS, str(BENCH)]
    run = Bench(options, dict.fromkeys(("tensorrt", "pytorch", COMPILING), command))
    try:
        run.run()
    finally:
        run.close()
    return json.loads(out.read_text())


def test_a_run_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BATCHES", (1, 8))
    result = run_with_measurers(tmp_path)
    assert (result["complete"], result["rounds"], result["gpu"]["gpu"]) == (True, 5, "NVIDIA Paper 1")
    assert len(result["rows"]) == 2 * 2 * 12
    rows = {
        tuple(row[key] for key in ("model", "engine", "precision", "mode", "batch")): row
        for row in result["rows"]
    }
    measured = rows["resnet50", "tensorrt", "int8", "graph", 8]
    assert measured["gpu_p50_us"] == 7200.0
    assert measured["gpu_per_s"] == pytest.approx(8 / 0.0072)
    assert [len(samples) for samples in measured["gpu_rounds_ns"]] == [14] * 5  # 0.1 s of 7.2 ms
    assert [len(samples) for samples in measured["call_rounds_ns"]] == [10] * 5
    compiled = rows["resnet50", "pytorch", "fp16", "compile", 1]
    assert compiled["unmeasured"] == "WorkerError: compile does not run: no C compiler"
    assert compiled["gpu_p50_us"] is None
    assert rows["minilm", "tensorrt", "fp32", "stream", 1]["unmeasured"] == "WorkerError: out of memory"
    faster = {(v["model"], v["batch"]): v["faster"] for v in result["int8_beside_fp16"]}
    assert faster == {(m, b): m == "resnet50" for m in ("resnet50", "minilm") for b in (1, 8)}


def test_a_run_that_ends_early_says_what_it_did_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PREPARE_SHARE", 0.0)
    result = run_with_measurers(tmp_path)
    reasons = {row["unmeasured"] for row in result["rows"]}
    assert reasons == {"not compiled within 0% of 5.0 minutes", "not built within 0% of 5.0 minutes"}
