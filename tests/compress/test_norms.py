"""Norms stay apart from the sums before them, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from onnx_models import model_from_text
from tritonsmith.compress.norms import part_norms


def residual_model() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(64, 64)).astype(np.float32),
        "b": random.normal(size=64).astype(np.float32),
        "g": random.normal(size=64).astype(np.float32),
    }
    return model_from_text(
        "residual (float[batch, length, 64] x) => (float[batch, length, 64] y) {"
        " a = MatMul(x, w)  c = Add(x, a)  d = LayerNormalization(c, g, b)  y = Add(d, b) }",
        weights,
    )


def run(model: onnx.ModelProto, path: Path, x: np.ndarray) -> tuple[np.ndarray, Counter[str]]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    kinds = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    return session.run(None, {"x": x})[0], kinds


def test_the_fused_norm_is_avoided_and_the_numbers_stay(tmp_path: Path) -> None:
    model = residual_model()
    x = np.random.default_rng(1).normal(size=(2, 5, 64)).astype(np.float32)
    before, kinds = run(model, tmp_path / "before.onnx", x)
    assert kinds["SkipLayerNormalization"] == 1
    assert part_norms(model.graph) == 1
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Sum", "LayerNormalization", "Add"]
    after, kinds = run(model, tmp_path / "after.onnx", x)
    assert kinds["SkipLayerNormalization"] == 0
    np.testing.assert_allclose(after, before, atol=1e-5)
