"""Tiny repositories for lint: one that is right, to be spoilt in one place, and what lint says of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from onnx_models import linear_model, linear_weights, model_from_text
from tritonsmith.containers import find_container
from tritonsmith.lint.findings import Finding
from tritonsmith.lint.run import lint
from tritonsmith.lint.scan import Deployment

LINEAR = """
backend: "onnxruntime"
max_batch_size: 4
input { name: "features" data_type: TYPE_FP32 dims: [4] }
output { name: "scores" data_type: TYPE_FP32 dims: [3] }
"""
DOUBLE = """
backend: "python"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [3] }
output { name: "y" data_type: TYPE_FP32 dims: [3] }
"""
PYTHON = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        arrays = [pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb.InferenceResponse([pb.Tensor("y", 2 * array)]) for array in arrays]
"""


def step(model: str, reads: str, writes: str, *, names: tuple[str, str] = ("x", "y")) -> str:
    return (
        f'step {{ model_name: "{model}" model_version: -1 '
        f'input_map {{ key: "{names[0]}" value: "{reads}" }} '
        f'output_map {{ key: "{names[1]}" value: "{writes}" }} }} '
    )


def ensemble(*steps: str, dims: str = "[3]", size: int = 4) -> str:
    """in: FP32[batch, 3] through the steps to out: FP32[batch, 3]."""
    return (
        f'platform: "ensemble" max_batch_size: {size} '
        f'input {{ name: "in" data_type: TYPE_FP32 dims: {dims} }} '
        f'output {{ name: "out" data_type: TYPE_FP32 dims: [3] }} '
        f"ensemble_scheduling {{ {' '.join(steps)} }}"
    )


def add_model(repository: Path, name: str, config: str, files: dict[str, bytes] | None = None) -> Path:
    """`files` by their name in version 1; the model's folder comes back."""
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    for file, content in (files or {}).items():
        (folder / "1" / file).write_bytes(content)
    return folder


def add_linear(
    repository: Path, name: str = "linear", config: str = LINEAR, model: onnx.ModelProto | None = None
) -> Path:
    content = (model or linear_model()).SerializeToString()
    return add_model(repository, name, config, {"model.onnx": content})


def add_double(repository: Path, name: str = "double", config: str = DOUBLE) -> Path:
    return add_model(repository, name, config, {"model.py": PYTHON.encode()})


def quantized(zero_point: str, *, named: bool = True) -> onnx.ModelProto:
    """Scores of quantized features; `zero_point` is a numpy type."""
    point = ", point" if named else ""
    weights = linear_weights() | {"scale": np.float32(0.1), "point": np.array(0, zero_point)}
    return model_from_text(
        "q (float[N, 4] features) => (float[N, 3] scores) {"
        f" small = QuantizeLinear(features, scale{point})"
        f" back = DequantizeLinear(small, scale{point})"
        " product = MatMul(back, weight)  scores = Add(product, bias) }",
        weights,
    )


def findings_of(
    repository: Path,
    *,
    container: str | None = None,
    gpu: str | None = None,
    target: str | None = None,
    configs_only: bool = False,
) -> tuple[Finding, ...]:
    deployment = Deployment(
        container=find_container(container) if container else None, gpu=gpu, target=target
    )
    return lint(repository, deployment, configs_only=configs_only)


def only(findings: Iterable[Finding]) -> Finding:
    """The one finding that there is; what it says of its place is part of the message of a failure."""
    found = list(findings)
    assert len(found) == 1, "\n".join(str(finding) for finding in found) or "lint found nothing"
    return found[0]
