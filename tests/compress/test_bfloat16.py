"""BF16: half the bytes, weights rounded to nearest, the same inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from digits_models import conv_model, make_model, split_digits, write_artifact
from tritonsmith.compress import steps
from tritonsmith.compress.bfloat16 import cast_bfloat16
from tritonsmith.compress.chain import Material
from tritonsmith.compress.float16 import apply_cast
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, UsageError

IMAGES = split_digits().test_images[:50, None]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_file_halves_and_runs_on_both_engines(tmp_path: Path, engine: str) -> None:
    artifact = write_artifact(conv_model(), tmp_path / "conv.onnx")
    spec, material = steps.Cast(to="bf16"), Material(teacher=artifact)
    narrow = apply_cast(spec, artifact, material, tmp_path / "model.onnx")
    assert (narrow.inputs, narrow.outputs, narrow.precision) == (artifact.inputs, artifact.outputs, "bf16")
    assert narrow.path.stat().st_size < 0.6 * artifact.path.stat().st_size
    expected, found = (
        open_session(model.path, engine=engine).run({"image": IMAGES})["probabilities"]
        for model in (artifact, narrow)
    )
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert 0 < narrow.steps[-1].measured["max_absolute_error"] < 0.03


def test_weights_are_rounded_to_nearest(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["image", "w"], ["probabilities"], name="product")]
    artifact = write_artifact(make_model(nodes, weights, image_shape=["batch", 64]), tmp_path / "m.onnx")
    narrow = cast_bfloat16(artifact, tmp_path / "model.onnx")
    (tensor,) = onnx.load(str(narrow.path)).graph.initializer
    assert tensor.data_type == TensorProto.BFLOAT16
    stored = numpy_helper.to_array(tensor).astype(np.float32)
    np.testing.assert_array_equal(stored, weights["w"].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_numbers_beyond_bfloat16_and_empty_models_are_not_cast(tmp_path: Path) -> None:
    weights = {"w": np.full((64, 10), 3.4e38, np.float32)}  # rounds to infinity
    nodes = [helper.make_node("Mul", ["image", "tiny"], ["small"], name="shrink")]
    nodes.append(helper.make_node("MatMul", ["small", "w"], ["probabilities"], name="product"))
    weights["tiny"] = np.array(1e-30, np.float32)
    artifact = write_artifact(make_model(nodes, weights, image_shape=["batch", 64]), tmp_path / "m.onnx")
    with pytest.raises(CompressionError, match="no FP32 weights to cast to BF16"):
        cast_bfloat16(artifact, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="no type is named 'fp8'"):
        apply_cast(steps.Cast(to="fp8"), artifact, Material(teacher=artifact), tmp_path / "model.onnx")
