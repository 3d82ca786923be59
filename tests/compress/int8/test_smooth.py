"""SmoothQuant: the same function in floating point, and less lost in INT8 where a channel is loud."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from digits_models import write_artifact
from quantize_models import attention_model, cosine, outlier_model, samples_of, tied_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress import steps
from tritonsmith.compress.int8.quantize import quantize_dynamic
from tritonsmith.compress.int8.smooth import smooth_model
from tritonsmith.compress.prepare import prepare_graph
from tritonsmith.engines import open_session
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.samples import Samples

ROWS = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)


def outlier(tmp_path: Path, *, normalised: bool) -> tuple[Artifact, Samples]:
    artifact = write_artifact(outlier_model(normalised=normalised), tmp_path / "outlier.onnx")
    return artifact, samples_of(tmp_path / "x.npz", artifact.inputs, ROWS[:100])


def smoothed(tmp_path: Path, artifact: Artifact, samples: Samples) -> tuple[Path, int]:
    folder = tmp_path / "prepared"
    folder.mkdir()
    prepared = prepare_graph(artifact.path, folder)
    return smooth_model(prepared, 0.5, samples, batched=True, spared=frozenset())


@pytest.mark.parametrize("normalised", [True, False])
def test_smoothing_leaves_the_function_as_it_was(tmp_path: Path, normalised: bool) -> None:
    artifact, samples = outlier(tmp_path, normalised=normalised)
    path, count = smoothed(tmp_path, artifact, samples)
    assert count == 1
    expected, found = (open_session(model).run({"x": ROWS})["y"] for model in (artifact.path, path))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    # The norm takes the factors where only the product reads it; beside a residual, a Mul does.
    assert ("Mul" in kinds) is not normalised


def test_factors_are_those_of_the_paper(tmp_path: Path) -> None:
    artifact, samples = outlier(tmp_path, normalised=True)
    path, _ = smoothed(tmp_path, artifact, samples)
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer}
        for file in (artifact.path, path)
    )
    rows = ROWS[:100].astype(np.float64)
    centred = rows - rows.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5) * before["gamma"] + before["beta"]
    factors = np.sqrt(np.abs(normal).max(axis=0)) / np.sqrt(np.abs(before["w"]).max(axis=1))
    np.testing.assert_allclose(after["gamma"], before["gamma"] / factors, rtol=1e-4)
    np.testing.assert_allclose(after["w"], before["w"] * factors[:, None], rtol=1e-4)


def test_a_loud_channel_costs_less_with_smoothing(tmp_path: Path) -> None:
    artifact, samples = outlier(tmp_path, normalised=False)
    expected = product(artifact)
    errors = []
    for alpha in (None, 0.5):
        spec = steps.Quantize(method="dynamic", smooth=alpha)
        quantized = quantize_dynamic(artifact, tmp_path / "model.onnx", spec=spec, calibration=samples)
        errors.append(np.abs(product(quantized) - expected).mean())
    assert errors[1] < errors[0] / 3
    assert quantized.steps[-1].options["smooth"] == 0.5
    assert quantized.steps[-1].measured["tensors_smoothed"] == 1


def product(artifact: Artifact) -> NDArray[Any]:
    return open_session(artifact.path).run({"x": ROWS[100:]})["y"]


def test_products_that_share_a_tensor_share_its_factors(tmp_path: Path) -> None:
    artifact = write_artifact(attention_model(), tmp_path / "attention.onnx")
    tokens = np.random.default_rng(1).integers(0, 100, (30, 9))
    samples = samples_of(tmp_path / "t.npz", artifact.inputs, tokens)
    path, count = smoothed(tmp_path, artifact, samples)
    assert count == 1  # q, k and v read the same embedding
    expected, found = (
        open_session(model).run({"tokens": tokens})["hidden"] for model in (artifact.path, path)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_weights_that_others_read_too_are_left_alone(tmp_path: Path) -> None:
    model = tied_model()
    model.graph.node[4].input[1] = "mix"  # the mixer's weights again, behind other activations
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 32
    artifact = write_artifact(model, tmp_path / "shared.onnx")
    tokens = np.random.default_rng(1).integers(0, 600, (20, 5))
    path, count = smoothed(tmp_path, artifact, samples_of(tmp_path / "t.npz", artifact.inputs, tokens))
    assert count == 0
    expected, found = (open_session(file).run({"tokens": tokens})["scores"] for file in (artifact.path, path))
    assert cosine(expected, found) > 0.999999


def test_smoothing_needs_data_and_an_alpha(tmp_path: Path) -> None:
    artifact, samples = outlier(tmp_path, normalised=False)
    with pytest.raises(SamplesError, match="smoothing needs calibration data"):
        quantize_dynamic(artifact, tmp_path / "model.onnx", spec=steps.Quantize(smooth=0.5))
    with pytest.raises(UsageError, match="no alpha of SmoothQuant"):
        quantize_dynamic(
            artifact, tmp_path / "model.onnx", spec=steps.Quantize(smooth=1.5), calibration=samples
        )
