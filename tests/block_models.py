"""Small models with an embedding table and matrix products, for what stores weights in blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_models import model_from_text, write_model
from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.samples import Samples

Array = NDArray[Any]

ROWS, WIDTH, INNER, CLASSES = 200, 64, 96, 32


def reader_weights(width: int = WIDTH) -> dict[str, Array]:
    random = np.random.default_rng(3)
    return {
        "table": random.normal(size=(ROWS, width)).astype(np.float32),
        "w1": (random.normal(size=(width, INNER)) / 8).astype(np.float32),
        "b1": random.normal(size=INNER).astype(np.float32),
        "w2": (random.normal(size=(CLASSES, INNER)) / 8).astype(np.float32),
        "b2": random.normal(size=CLASSES).astype(np.float32),
        "axis": np.array([1]),
    }


def reader_model(width: int = WIDTH, *, opset: int = 17) -> onnx.ModelProto:
    """ids [batch, length] -> rows of a table, MatMul, Add, Relu, mean over length, Gemm -> scores."""
    return model_from_text(
        f"reader (int64[batch, length] ids) => (float[batch, {CLASSES}] scores) {{"
        " rows = Gather(table, ids)"
        " product = MatMul(rows, w1)  moved = Add(product, b1)  active = Relu(moved)"
        f" {mean_of(opset)}"
        " scores = Gemm <transB: int = 1> (mean, w2, b2)"
        " }",
        reader_weights(width),
        opset=opset,
    )


def mean_of(opset: int) -> str:
    if opset >= 18:
        return "mean = ReduceMean <keepdims: int = 0> (active, axis)"
    return "mean = ReduceMean <keepdims: int = 0, axes: ints = [1]> (active)"


def reader_scores(ids: Array, weights: dict[str, Array]) -> Array:
    """What the model computes, in float64."""
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    active = np.maximum(wide["table"][ids] @ wide["w1"] + wide["b1"], 0)
    scores: Array = active.mean(axis=1) @ wide["w2"].T + wide["b2"]
    return scores


def reader_ids(count: int, seed: int = 0, length: int = 9) -> Array:
    return np.random.default_rng(seed).integers(0, ROWS, (count, length))


def artifact_of(model: onnx.ModelProto, path: Path) -> Artifact:
    write_model(path, model)
    inputs, outputs = onnx_model.signature_of(model)
    return Artifact(
        path=path,
        format="onnx",
        inputs=inputs,
        outputs=outputs,
        batched=True,
        precision="fp32",
        steps=(),
    )


def samples_of(**arrays: Array) -> Samples:
    """Samples that lie in no file; steps only name it."""
    return Samples(path=Path("samples.npz"), sha256="0" * 64, arrays=arrays, target=None)
