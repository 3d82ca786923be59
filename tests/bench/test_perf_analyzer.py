"""The real perf_analyzer: found, told from an empty placeholder, and sending just what a sample holds."""

from __future__ import annotations

import base64
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from served_models import Addresses
from tritonsmith.bench import perf_analyzer
from tritonsmith.bench.perf_analyzer import Load, PerfAnalyzer, ensure_perf_analyzer, find_perf_analyzer
from tritonsmith.errors import BenchError, ProvisionError
from tritonsmith.server import ServerOptions, serve
from tritonsmith.server.environment import ServerEnvironment

# Four samples whose bytes a careless writer would change: no UTF-8, NULs at the end, halves, extremes.
HALF = np.array([[0.1, -65504.0], [6e-8, np.inf], [1.5, 2.5], [0.0, -0.0]], np.float16)
RAW = np.array([[b"\xff\xfe\x00\x80"], [b""], ["ä€".encode()], [b'"},{\\\x00\x00']], object)
IDS = np.array([[[-1, 2]], [[2**53 + 1, -(2**63)]], [[0, 1]], [[7, 7]]], np.int64)
SAMPLES = {"half": HALF, "raw": RAW, "ids": IDS}

# Answers only what stands in its list: the bytes of a whole sample.
STRICT = """
import json, os
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        known = json.loads('KNOWN')
        self.known = {tuple(row) for row in known}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        half, raw, ids = (pb.get_input_tensor_by_name(request, n).as_numpy() for n in ("half", "raw", "ids"))
        for index in range(len(half)):
            row = (half[index].tobytes().hex(), raw[index, 0].hex(), ids[index].tobytes().hex())
            if row not in self.known:
                return pb.InferenceResponse(error=pb.TritonError(f"unknown sample {row}"))
        return pb.InferenceResponse([pb.Tensor("ok", np.ones((len(half), 1), np.float32))])
"""
STRICT_CONFIG = """
backend: "python"
max_batch_size: 4
input [{ name: "half" data_type: TYPE_FP16 dims: [2] },
       { name: "raw" data_type: TYPE_STRING dims: [1] },
       { name: "ids" data_type: TYPE_INT64 dims: [1, -1] }]
output [{ name: "ok" data_type: TYPE_FP32 dims: [1] }]
"""


@pytest.fixture(scope="module")
def analyzer(server_environment: ServerEnvironment) -> PerfAnalyzer:
    return ensure_perf_analyzer()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of gRPC of a server whose one model knows SAMPLES alone."""
    repository = tmp_path_factory.mktemp("strict")
    folder = repository / "strict" / "1"
    folder.mkdir(parents=True)
    known = [
        [HALF[index].tobytes().hex(), RAW[index, 0].hex(), IDS[index].tobytes().hex()]
        for index in range(len(HALF))
    ]
    (folder / "model.py").write_text(STRICT.replace("KNOWN", json.dumps(known)))
    (folder.parent / "config.pbtxt").write_text(STRICT_CONFIG)
    with serve(repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield server.grpc_url


@pytest.fixture
def load(served_models: Addresses, tmp_path: Path) -> Load:
    perf_analyzer.write_input_data({"x": np.ones((2, 3), np.float32)}, tmp_path / "ones.json")
    return Load(
        model="affine",
        url=served_models.grpc.partition("://")[2],
        protocol="grpc",
        concurrency=2,
        batch_size=1,
        interval_ms=300,
        input_data=tmp_path / "ones.json",
        keep_samples=True,
    )


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("#!/bin/sh\nexit 0\n", id="the placeholder: it runs and says nothing"),
        pytest.param("\x7fELF, but no program", id="no program"),
        pytest.param("#!/no/such/interpreter\n", id="no interpreter"),
        pytest.param("#!/bin/sh\necho cannot open libb64.so.0d >&2; exit 127\n", id="a library is missing"),
    ],
)
def test_what_is_no_perf_analyzer_is_passed_over(
    analyzer: PerfAnalyzer, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "perf_analyzer", content)
    put_on_path(monkeypatch, tmp_path)
    found = find_perf_analyzer()
    assert found is not None
    assert found.path != tmp_path / "perf_analyzer"
    assert found.origin == "tritonclient==2.50.0"


def test_a_real_one_on_path_is_used(
    analyzer: PerfAnalyzer, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = analyzer.library_path or ""
    text = f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{analyzer.path}" "$@"\n'
    write_program(tmp_path / "with a space" / "perf_analyzer", text)
    put_on_path(monkeypatch, tmp_path / "with a space")
    found = find_perf_analyzer()
    assert found is not None
    assert (found.path, found.origin) == (tmp_path / "with a space" / "perf_analyzer", "PATH")
    assert perf_analyzer.run(found, load).throughput_per_s > 0


def test_it_is_installed_where_it_is_missing(
    server_environment: ServerEnvironment,
    analyzer: PerfAnalyzer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = analyzer.path.parents[4]
    fresh = tmp_path / "a cache"
    fresh.mkdir()
    (fresh / "environments").symlink_to(cache / "environments")
    monkeypatch.setenv("TRITONSMITH_CACHE", str(fresh))
    assert find_perf_analyzer() is None
    said: list[str] = []
    installed = ensure_perf_analyzer(say=said.append)
    assert installed.path.is_relative_to(fresh)
    assert said == ["downloading tritonclient==2.50.0"]
    assert find_perf_analyzer() == installed

    installed.path.write_bytes(b"cut off")
    with pytest.raises(ProvisionError, match="does not run here") as caught:
        ensure_perf_analyzer()
    assert str(fresh) in str(caught.value)


def test_input_data_holds_the_bytes_of_the_wire(tmp_path: Path) -> None:
    perf_analyzer.write_input_data(SAMPLES, tmp_path / "inputs.json")
    data = json.loads((tmp_path / "inputs.json").read_text(encoding="utf-8"))["data"]
    assert len(data) == 4
    assert data[0]["half"]["shape"] == [2]
    assert data[0]["ids"]["shape"] == [1, 2]
    # 0.1 is 0x2e66, -65504 is 0xfbff; a string is its length in 4 bytes, then itself.
    assert base64.b64decode(data[0]["half"]["content"]["b64"]) == bytes.fromhex("662efffb")
    assert base64.b64decode(data[0]["raw"]["content"]["b64"]) == b"\x04\0\0\0\xff\xfe\x00\x80"
    assert base64.b64decode(data[1]["raw"]["content"]["b64"]) == b"\0\0\0\0"
    assert base64.b64decode(data[0]["ids"]["content"]["b64"]) == b"\xff" * 8 + b"\x02" + bytes(7)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sample_arrives_as_it_is(
    analyzer: PerfAnalyzer, strict: str, load: Load, batch_size: int, tmp_path: Path
) -> None:
    perf_analyzer.write_input_data(SAMPLES, tmp_path / "inputs.json")
    sent = replace(
        load, model="strict", url=strict, input_data=tmp_path / "inputs.json", batch_size=batch_size
    )
    run = perf_analyzer.run(analyzer, sent)
    assert run.throughput_per_s > 0
    assert run.latencies_us


@pytest.mark.parametrize("name", ["half", "raw", "ids"])
def test_a_sample_that_differs_in_one_tensor_is_noticed(
    analyzer: PerfAnalyzer, strict: str, load: Load, name: str, tmp_path: Path
) -> None:
    """The control of the test above: the model does look."""
    other = SAMPLES[name].copy()
    other[2] = other[3]
    perf_analyzer.write_input_data({**SAMPLES, name: other}, tmp_path / "inputs.json")
    sent = replace(load, model="strict", url=strict, input_data=tmp_path / "inputs.json")
    with pytest.raises(BenchError, match="perf_analyzer") as caught:
        perf_analyzer.run(analyzer, sent)
    assert "unknown sample" in str(caught.value.found)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_raw_latencies_and_the_report_agree(
    analyzer: PerfAnalyzer, load: Load, served_models: Addresses, protocol: str
) -> None:
    url = getattr(served_models, protocol).partition("://")[2]
    run = perf_analyzer.run(analyzer, replace(load, protocol=protocol, url=url))
    assert statistics.median(run.latencies_us) == pytest.approx(run.p50_us, rel=0.1)
    assert np.percentile(run.latencies_us, 90) == pytest.approx(run.p90_us, rel=0.25)
    assert run.p50_us <= run.p90_us <= run.p95_us <= run.p99_us
    # Two requests are always under way, so that throughput times latency is two (Little's law).
    mean_s = statistics.fmean(run.latencies_us) / 1e6
    assert run.throughput_per_s * mean_s == pytest.approx(2, rel=0.3)
    parts = run.queue_us + run.compute_input_us + run.compute_infer_us + run.compute_output_us
    assert 0 < parts < mean_s * 1e6 * 1.3


def test_a_batch_counts_as_its_samples(analyzer: PerfAnalyzer, load: Load) -> None:
    run = perf_analyzer.run(analyzer, replace(load, batch_size=4, concurrency=1))
    mean_s = statistics.fmean(run.latencies_us) / 1e6
    assert run.throughput_per_s * mean_s == pytest.approx(4, rel=0.3)


def test_latencies_are_left_out_where_they_would_be_too_much(analyzer: PerfAnalyzer, load: Load) -> None:
    run = perf_analyzer.run(analyzer, replace(load, keep_samples=False))
    assert run.latencies_us == ()
    assert run.p50_us > 0


def test_a_model_that_refuses_is_told_with_its_reason(
    analyzer: PerfAnalyzer, load: Load, tmp_path: Path
) -> None:
    perf_analyzer.write_input_data({"x": np.array([[-3]], np.float32)}, tmp_path / "inputs.json")
    with pytest.raises(BenchError) as caught:
        perf_analyzer.run(analyzer, replace(load, model="picky", input_data=tmp_path / "inputs.json"))
    assert "below zero: -3.0" in str(caught.value.found)


def test_a_window_that_is_too_short_is_told(analyzer: PerfAnalyzer, load: Load, tmp_path: Path) -> None:
    """A request of a second has no place in a window of 50 ms."""
    perf_analyzer.write_input_data({"seconds": np.array([[1.0]], np.float32)}, tmp_path / "inputs.json")
    slow = replace(load, model="slow", input_data=tmp_path / "inputs.json", interval_ms=50)
    with pytest.raises(BenchError) as caught:
        perf_analyzer.run(analyzer, slow)
    assert "--interval-ms" in str(caught.value.fix)


def test_nothing_is_left_in_the_temporary_folder(
    analyzer: PerfAnalyzer, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    perf_analyzer.run(analyzer, load)
    with pytest.raises(BenchError):
        perf_analyzer.run(analyzer, replace(load, model="no_such_model"))
    assert [path.name for path in tmp_path.iterdir()] == ["ones.json"]  # the inputs, made by the fixture
