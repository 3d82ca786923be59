"""Tiny ONNX models, written in ONNX's own text form, each with what it computes in its docstring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray


def model_from_text(
    text: str,
    weights: Mapping[str, NDArray[Any]] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 8,
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model from the text of its graph, `name (inputs) => (outputs) { nodes }`, and its weights."""
    imports = ", ".join(
        f'"{domain}": {version}' for domain, version in {"": opset, **(domains or {})}.items()
    )
    model = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]> {text}")
    for name, array in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def write_model(path: Path, model: onnx.ModelProto) -> Path:
    """Save a model where a test wants it; the path comes back."""
    path.write_bytes(model.SerializeToString())
    return path


def linear_weights() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(1)
    return {
        "weight": random.normal(size=(4, 3)).astype(np.float32),
        "bias": random.normal(size=3).astype(np.float32),
    }


def linear_model(batch: str | int = "N", **versions: int) -> onnx.ModelProto:
    """scores = features @ weight + bias, of `linear_weights`; float32[batch, 4] to float32[batch, 3]."""
    return model_from_text(
        f"linear (float[{batch}, 4] features) => (float[{batch}, 3] scores) "
        "{ product = MatMul(features, weight)  scores = Add(product, bias) }",
        linear_weights(),
        **versions,
    )


def embedding_model(rows: int = 11) -> onnx.ModelProto:
    """The mean over a sequence of rows of a table; int64[N, length] to float32[N, 4]."""
    table = np.random.default_rng(2).normal(size=(rows, 4)).astype(np.float32)
    return model_from_text(
        "embed (int64[N, length] ids) => (float[N, 4] mean) "
        "{ vectors = Gather(table, ids)  mean = ReduceMean <keepdims: int = 0> (vectors, axis) }",
        {"table": table, "axis": np.array([1])},
    )


def identity_model(data_type: str, shape: str = "N, 2") -> onnx.ModelProto:
    """y = x, for any data type of ONNX's text form and any shape."""
    return model_from_text(f"same ({data_type}[{shape}] x) => ({data_type}[{shape}] y) {{ y = Identity(x) }}")


def branching_model() -> onnx.ModelProto:
    """y = x + 1 where flag is set, else x * 2; both branches read x from the graph around them."""
    return model_from_text(
        "branch (bool flag, float[n] x) => (float[n] y) {"
        " one = Constant <value = float {1.0}> ()"
        " two = Constant <value = float {2.0}> ()"
        " y = If (flag) <"
        "  then_branch = yes () => (float[n] y_then) { y_then = Add(x, one) },"
        "  else_branch = no () => (float[n] y_else) { y_else = Mul(x, two) }"
        " > }"
    )
