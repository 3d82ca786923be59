"""Tensors without an axis of their own: Triton serves each as [1], samples stay as the model takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_models import model_from_text, write_model
from tritonsmith.bench.measure import BenchOptions, bench
from tritonsmith.build import build
from tritonsmith.recipe import BuildRequest
from tritonsmith.server import ServerOptions, serve
from tritonsmith.validate import validate

MODELS = {
    "scalar": "g (float x, float[3] v) => (float y, float[3] z)"
    " { y = ReduceSum <keepdims: int = 0> (v)  z = Mul(x, v) }",
    "column": "g (float[batch] x) => (float[batch] y) { y = Add(x, x) }",
}
SAMPLES = {
    "scalar": {"x": np.float32([1.5, -2.0]), "v": np.float32([[1, 2, 3], [4, 5, 6]])},
    "column": {"x": np.float32([1.0, 2.0, 3.0, 4.0])},
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_rank_0_from_file_to_benchmark(tmp_path: Path, backend: str) -> None:
    repository = tmp_path / "repository"
    for name, text in MODELS.items():
        source = tmp_path / f"{name}.onnx"
        write_model(source, model_from_text(text))
        build(BuildRequest(name=name, source=str(source), repository=repository, backend=backend))
        np.savez(tmp_path / f"{name}.npz", **SAMPLES[name])
    with serve(repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
        for name in MODELS:
            report = validate(
                repository,
                name,
                tmp_path / f"{name}.npz",
                against=str(tmp_path / f"{name}.onnx"),
                http_url=server.http_url,
                grpc_url=f"grpc://{server.grpc_url}",
            )
            assert report.passed, report.json()
        options = BenchOptions(concurrency=(1,), rounds=1, interval_ms=200, samples=tmp_path / "column.npz")
        assert bench("column", server.grpc_url, options).levels[0].throughput_per_s > 0
