"""Bias correction: the mean error of each channel goes, whatever the layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from digits_models import write_artifact
from quantize_models import build, samples_of
from tritonsmith.compress import steps
from tritonsmith.compress.int8.quantize import quantize_dynamic, quantize_static
from tritonsmith.engines import open_session
from tritonsmith.errors import UsageError

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.5, 1.0, (64, 3, 6, 6)).astype(np.float32)  # all of one sign: errors add up
# One large weight a channel, so that the small ones round badly.
KERNEL = np.where(RNG.uniform(size=(4, 3, 3, 3)) < 0.04, 2.0, 0.0) + RNG.uniform(0.0, 0.007, (4, 3, 3, 3))
MATRIX = np.where(RNG.uniform(size=(108, 16)) < 0.04, 2.0, 0.0) + RNG.uniform(0.0, 0.007, (108, 16))

LAYERS = {
    "conv without bias": (
        [helper.make_node("Conv", ["x", "k"], ["y"], "layer", pads=[1] * 4)],
        {"k": KERNEL},
    ),
    "conv with bias": (
        [helper.make_node("Conv", ["x", "k", "b"], ["y"], "layer")],
        {"k": KERNEL, "b": np.arange(4.0)},
    ),
    "transposed": (
        [helper.make_node("ConvTranspose", ["x", "k"], ["y"], "layer")],
        {"k": KERNEL.transpose(1, 0, 2, 3)},
    ),
    "gemm": (
        [
            helper.make_node("Flatten", ["x"], ["flat"], "flatten"),
            helper.make_node("Gemm", ["flat", "w", "b"], ["y"], "layer", beta=0.5),
        ],
        {"w": MATRIX, "b": np.arange(16.0)},
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_error_of_each_channel_goes(tmp_path: Path, layer: str) -> None:
    nodes, weights = LAYERS[layer]
    shape: list[int | str] = ["batch", 16] if layer == "gemm" else ["batch", 4, "h", "w"]
    model = build(nodes, weights, inputs={"x": ["batch", 3, 6, 6]}, outputs={"y": shape})
    artifact = write_artifact(model, tmp_path / "layer.onnx")
    samples = samples_of(tmp_path / "x.npz", artifact.inputs, IMAGES)
    expected = open_session(artifact.path).run({"x": IMAGES})["y"]
    axes = tuple(axis for axis in range(expected.ndim) if axis != 1)
    errors = []
    for corrected in (False, True):
        spec = steps.Quantize(bias_correction=corrected)
        quantized = quantize_static(artifact, samples, tmp_path / "model.onnx", dialect="tensorrt", spec=spec)
        found = open_session(quantized.path).run({"x": IMAGES})["y"]
        errors.append(np.abs((found - expected).mean(axis=axes)).max())
    assert quantized.steps[-1].measured["biases_corrected"] == 1
    assert errors[1] < errors[0] / 20


def test_onnx_runtimes_dialect_is_corrected_too(tmp_path: Path) -> None:
    nodes, weights = LAYERS["conv with bias"]
    nodes = [*nodes[:1], helper.make_node("Relu", ["y"], ["z"], "relu")]
    model = build(nodes, weights, inputs={"x": ["batch", 3, 6, 6]}, outputs={"z": ["batch", 4, "h", "w"]})
    artifact = write_artifact(model, tmp_path / "layer.onnx")
    samples = samples_of(tmp_path / "x.npz", artifact.inputs, IMAGES)
    expected = open_session(artifact.path).run({"x": IMAGES})["z"]
    errors = []
    for corrected in (False, True):
        spec = steps.Quantize(bias_correction=corrected)
        quantized = quantize_static(artifact, samples, tmp_path / "model.onnx", spec=spec)
        found = open_session(quantized.path).run({"x": IMAGES})["z"]
        errors.append(np.abs((found - expected).mean(axis=(0, 2, 3))).max())
    assert errors[1] < errors[0] / 3


def test_dynamic_int8_has_no_bias_to_correct(tmp_path: Path) -> None:
    nodes, weights = LAYERS["gemm"]
    model = build(nodes, weights, inputs={"x": ["batch", 3, 6, 6]}, outputs={"y": ["batch", 16]})
    artifact = write_artifact(model, tmp_path / "layer.onnx")
    with pytest.raises(UsageError, match="bias correction needs static INT8"):
        quantize_dynamic(artifact, tmp_path / "model.onnx", spec=steps.Quantize(bias_correction=True))
