"""The audit's reasons: each product that stays in floating point is named as its owner knows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from digits_models import conv_model, write_artifact
from quantize_models import attention_model, build, residual_model, samples_of
from tritonsmith.artifact import Artifact
from tritonsmith.compress import steps
from tritonsmith.compress.int8.audit import MOST_REASONS, Audit, audit_int8
from tritonsmith.compress.int8.quantize import quantize_dynamic, quantize_static
from tritonsmith.errors import CompressionError

RNG = np.random.default_rng(0)


def residual(tmp_path: Path, **options: object) -> Artifact:
    artifact = write_artifact(residual_model(), tmp_path / "residual.onnx")
    images = RNG.normal(size=(20, 3, 8, 8)).astype(np.float32)
    samples = samples_of(tmp_path / "x.npz", artifact.inputs, images)
    return quantize_static(artifact, samples, tmp_path / "model.onnx", spec=steps.Quantize(**options))


def test_products_of_attention_are_named_with_their_reason(tmp_path: Path) -> None:
    artifact = write_artifact(attention_model(), tmp_path / "attention.onnx")
    said: list[str] = []
    quantized = quantize_dynamic(artifact, tmp_path / "model.onnx", say=said.append)
    reason = "multiplies two activations (attention)"
    assert sorted(quantized.steps[-1].measured["float_ops"]) == [
        ["mix", "MatMul", reason],
        ["scores", "MatMul", reason],
    ]
    assert "INT8: 3 of 5 convolutions and matrix products run in INT8 on ONNX Runtime CPU" in said
    assert f"2 not in INT8, {reason}: scores, mix" in said


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_float_model_was_not_quantized(tmp_path: Path, engine: str) -> None:
    artifact = write_artifact(conv_model(), tmp_path / "conv.onnx")
    audit = audit_int8(artifact.path, engine=engine)
    assert (audit.int8_ops, audit.ops) == (0, 3)
    assert set(audit.reasons) == {
        ("conv_1", "Conv", "its weights were not quantized"),
        ("conv_2", "Conv", "its weights were not quantized"),
        ("dense", "Gemm", "its weights were not quantized"),
    }


def test_what_a_kept_neighbour_does_to_a_convolution_is_said(tmp_path: Path) -> None:
    quantized = residual(tmp_path, keep=("pool", "up"))
    reasons = {node: reason for node, _, reason in quantized.steps[-1].measured["float_ops"]}
    assert reasons["up"].startswith("kept in floating point")
    assert set(reasons) <= {"up", "wide"}


def test_a_convolution_whose_result_is_read_in_floating_point_cannot_be_fused(tmp_path: Path) -> None:
    """The file is TensorRT's, whose convolutions give floats; ONNX Runtime leaves them so."""
    artifact = write_artifact(residual_model(), tmp_path / "residual.onnx")
    images = RNG.normal(size=(20, 3, 8, 8)).astype(np.float32)
    samples = samples_of(tmp_path / "x.npz", artifact.inputs, images)
    quantized = quantize_static(artifact, samples, tmp_path / "model.onnx", dialect="tensorrt")
    audit = audit_int8(quantized.path, engine="onnxruntime", original=artifact.path)
    reasons = {node: reason for node, _, reason in audit.reasons}
    assert reasons["second"] == "its result is read in floating point by shortcut"
    assert reasons["narrow"] == "its weights were not quantized"


def test_weights_in_blocks_are_weights_only(tmp_path: Path) -> None:
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        "narrow",
        domain="com.microsoft",
        K=32,
        N=8,
        bits=4,
        block_size=32,
    )
    model = build([node], {}, inputs={"x": ["batch", 32]}, outputs={"y": ["batch", 8]})
    packed = RNG.integers(0, 255, (8, 1, 16)).astype(np.uint8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(packed, "packed"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "scales"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    artifact = write_artifact(model, tmp_path / "blocks.onnx")
    audit = audit_int8(artifact.path, engine="onnxruntime")
    assert audit.reasons == (
        ("narrow", "MatMulNBits", "weights only: they are widened, and the product is a float one"),
    )


def test_a_recurrent_net_without_kernels_is_refused_with_the_reason(tmp_path: Path) -> None:
    weights = {"w": RNG.normal(size=(1, 48, 8)), "r": RNG.normal(size=(1, 48, 16))}
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], "gru", hidden_size=16)
    shape: list[int | str] = ["steps", "batch", 8]
    model = build([node], weights, inputs={"x": shape}, outputs={"y": ["steps", 1, "batch", 16]})
    artifact = write_artifact(model, tmp_path / "gru.onnx")
    with pytest.raises(CompressionError, match="would run nothing of it in INT8") as caught:
        quantize_dynamic(artifact, tmp_path / "model.onnx")
    assert "no engine has INT8 kernels for GRU: gru" in str(caught.value.found)


def test_a_long_list_of_reasons_is_cut_in_the_manifest() -> None:
    reasons = tuple((f"n{index}", "MatMul", "why") for index in range(100))
    audit = Audit(int8_ops=0, ops=100, by_type={}, reasons=reasons)
    measured = audit.measured()
    assert len(measured["float_ops"]) == MOST_REASONS
    assert measured["float_ops_left_out"] == 100 - MOST_REASONS
    assert audit.lines() == ["100 not in INT8, why: n0, n1, n2, n3 and 96 more"]
