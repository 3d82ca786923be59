"""FP16: half the bytes, the same inputs and outputs, and what overflows kept in FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from digits_models import conv_model, make_model, split_digits, write_artifact, write_samples
from tritonsmith.artifact import Artifact
from tritonsmith.compress.float16 import cast_float16
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError
from tritonsmith.samples import load_samples


def run(artifact: Artifact, images: np.ndarray) -> np.ndarray:
    return open_session(artifact.path).run({"image": images})["probabilities"]


def test_weights_are_halved_and_clients_see_no_change(tmp_path: Path) -> None:
    artifact = write_artifact(conv_model(), tmp_path / "conv.onnx")
    images = split_digits().test_images[:50, None]

    half = cast_float16(artifact, tmp_path / "model.onnx")

    assert (half.inputs, half.outputs, half.precision) == (artifact.inputs, artifact.outputs, "fp16")
    weights = [tensor for tensor in onnx.load(str(half.path)).graph.initializer if tensor.dims]
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}
    onnx.checker.check_model(str(half.path), full_check=True)  # new Casts in an order that ONNX allows, too
    step = half.steps[-1]
    assert step.bytes_after < 0.6 * step.bytes_before
    np.testing.assert_allclose(run(half, images), run(artifact, images), atol=0.005)
    assert 0 < step.measured["max_absolute_error"] < 0.005


def test_a_product_beyond_the_range_of_fp16_stays_in_fp32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["image", "up"], ["large"], name="up_product"),
        helper.make_node("MatMul", ["large", "down"], ["small"], name="down_product"),
        helper.make_node("MatMul", ["small", "mix"], ["probabilities"], name="mix_product"),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "up": 30_000 * np.eye(64),
        "down": np.eye(64) / 30_000,
        "mix": rng.normal(0, 0.1, (64, 10)),
    }
    model = make_model(nodes, weights, image_shape=["batch", 64])
    artifact = write_artifact(model, tmp_path / "large.onnx")
    images = split_digits().test_images[:50].reshape(-1, 64)
    samples = load_samples(write_samples(tmp_path / "samples.npz", images), artifact.inputs)

    said: list[str] = []
    half = cast_float16(artifact, tmp_path / "model.onnx", samples=samples, say=said.append)

    assert half.steps[-1].measured["nodes_kept_fp32"] == 2
    assert said == ["2 nodes leave the range of FP16 and stay in FP32"]
    kinds = {
        tensor.name: tensor.data_type for tensor in onnx.load(str(half.path)).graph.initializer if tensor.dims
    }
    assert kinds["up"] == kinds["down"] == TensorProto.FLOAT
    assert kinds["mix"] == TensorProto.FLOAT16
    np.testing.assert_allclose(run(half, images), run(artifact, images), atol=0.01)


def test_resize_keeps_the_input_that_must_be_fp32(tmp_path: Path) -> None:
    weights = {"scales": np.array([1, 1, 2, 2]), "k": np.random.default_rng(0).normal(size=(4, 1, 3, 3))}
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["filtered"], name="conv", pads=[1] * 4),
        helper.make_node("Resize", ["filtered", "", "scales"], ["probabilities"], name="resize"),
    ]
    output: tuple[str, list[int | str]] = ("probabilities", ["batch", 4, 16, 16])
    model = make_model(nodes, weights, image_shape=["batch", 1, 8, 8], output=output)
    artifact = write_artifact(model, tmp_path / "resize.onnx")
    images = split_digits().test_images[:5, None]

    half = cast_float16(artifact, tmp_path / "model.onnx")

    np.testing.assert_allclose(run(half, images), run(artifact, images), atol=0.02)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Softmax", ["image"], ["probabilities"], name="softmax")]
    model = make_model(nodes, {}, image_shape=["batch", 10])
    artifact = write_artifact(model, tmp_path / "plain.onnx")
    with pytest.raises(CompressionError, match="no FP32 weights to cast"):
        cast_float16(artifact, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.onnx"]
