"""Two dialects from one calibration: the same ranges, each engine's rules, files that shrink and run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from digits_models import conv_model, make_model, split_digits, write_artifact
from quantize_models import build, cosine, residual_model, samples_of
from tritonsmith.artifact import Artifact
from tritonsmith.compress import steps
from tritonsmith.compress.int8 import static
from tritonsmith.compress.int8.quantize import quantize_static
from tritonsmith.engines import open_session
from tritonsmith.errors import UsageError
from tritonsmith.samples import Samples


def arrays_of(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


@pytest.fixture
def conv(tmp_path: Path) -> Artifact:
    return write_artifact(conv_model(), tmp_path / "conv.onnx")


@pytest.fixture
def digits(tmp_path: Path, conv: Artifact) -> Samples:
    return samples_of(tmp_path / "c.npz", conv.inputs, split_digits().train_images[:100, None])


@pytest.fixture
def residual(tmp_path: Path) -> Artifact:
    return write_artifact(residual_model(), tmp_path / "residual.onnx")


@pytest.fixture
def images(tmp_path: Path, residual: Artifact) -> Samples:
    array = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32)
    return samples_of(tmp_path / "images.npz", residual.inputs, array)


def test_one_pass_gives_both_dialects_the_scales_of_the_same_ranges(
    tmp_path: Path, conv: Artifact, digits: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = steps.Quantize(calibrator="percentile", percentile=99.0)
    passes = []
    collect = static.collect_histograms

    def counted(*values: Any, **named: Any) -> Any:
        passes.append(1)
        return collect(*values, **named)

    monkeypatch.setattr(static, "collect_histograms", counted)
    files = {
        dialect: quantize_static(
            conv,
            digits,
            tmp_path / f"{dialect}.onnx",
            dialect=dialect,
            spec=spec,
            ranges_folder=tmp_path / "r",
        ).path
        for dialect in ("onnxruntime", "tensorrt")
    }
    assert len(passes) == 1

    asymmetric, symmetric = (arrays_of(files[dialect]) for dialect in ("onnxruntime", "tensorrt"))
    shared = [name for name in symmetric if name.endswith("_scale") and symmetric[name].ndim == 0]
    assert set(shared) == {"image_scale", "relu1_scale", "relu2_scale"}
    for name in shared:  # none is negative: low is 0 in both
        high = asymmetric[name] * 255
        assert symmetric[name] * 127 == pytest.approx(high, rel=1e-5)
    model = conv_model()
    model.graph.output.append(onnx.ValueInfoProto(name="relu2"))
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (seen,) = session.run(["relu2"], {"image": digits.arrays["image"]})
    expected = np.percentile(seen[seen > 0], 99.0)
    assert symmetric["relu2_scale"] * 127 == pytest.approx(expected, rel=0.01)


def test_tensorrt_gets_symmetric_inputs_int8_weights_and_float_biases(
    tmp_path: Path, residual: Artifact, images: Samples
) -> None:
    quantized = quantize_static(residual, images, tmp_path / "model.onnx", dialect="tensorrt")
    graph = onnx.load(str(quantized.path)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    nodes = {node.name: node for node in graph.node}

    for name, axis, channels in (("stem", 0, 16), ("first", 0, 16), ("up", 1, 8), ("wide", 1, 16)):
        data, weight = (makers[tensor] for tensor in nodes[name].input[:2])
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert tensors[weight.input[0]].data_type == TensorProto.INT8
        assert [attribute.i for attribute in weight.attribute] == [axis]
        assert list(tensors[weight.input[1]].dims) == [channels]
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            point = numpy_helper.to_array(tensors[node.input[2]])
            assert point.dtype == np.int8
            assert not point.any()
    assert tensors[nodes["second"].input[2]].data_type == TensorProto.FLOAT
    assert not any(tensor.data_type == TensorProto.INT32 for tensor in graph.initializer)
    assert makers[nodes["pool"].input[0]].op_type == "DequantizeLinear"


def test_tensorrt_quantizes_the_shortcut_and_leaves_results_and_small_products_alone(
    tmp_path: Path, residual: Artifact, images: Samples
) -> None:
    quantized = quantize_static(residual, images, tmp_path / "model.onnx", dialect="tensorrt")
    graph = onnx.load(str(quantized.path)).graph
    makers = {name: node for node in graph.node for name in node.output}
    nodes = {node.name: node for node in graph.node}

    assert [makers[name].op_type for name in nodes["shortcut"].input] == ["Conv", "DequantizeLinear"]
    assert [makers[name].op_type for name in nodes["narrow"].input if name in makers] == ["Relu"]
    assert makers[nodes["softmax"].input[0]].name == "narrow"
    assert makers[graph.output[0].name].op_type == "Softmax"
    measured = quantized.steps[-1].measured
    assert (measured["int8_ops"], measured["ops"]) == (5, 6)
    reasons = measured["float_ops"]
    assert reasons == [
        ["narrow", "MatMul", "a side of its weights is below 16, which is faster in floating point"]
    ]


def test_the_tensorrt_file_shrinks_and_computes_the_same(
    tmp_path: Path, residual: Artifact, images: Samples
) -> None:
    quantized = quantize_static(residual, images, tmp_path / "model.onnx", dialect="tensorrt")
    assert quantized.path.stat().st_size < residual.path.stat().st_size / 2.2
    onnx.checker.check_model(str(quantized.path), full_check=True)
    new = np.random.default_rng(9).normal(size=(50, 3, 8, 8)).astype(np.float32)
    expected, found = (
        open_session(artifact.path).run({"image": new})["probabilities"] for artifact in (residual, quantized)
    )
    assert cosine(expected, found) > 0.999


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
def test_a_kept_node_stays_in_floating_point_and_is_named(
    tmp_path: Path, conv: Artifact, digits: Samples, dialect: str
) -> None:
    spec = steps.Quantize(keep=("conv_2",))
    quantized = quantize_static(conv, digits, tmp_path / "model.onnx", dialect=dialect, spec=spec)
    weights = {name: array.dtype for name, array in arrays_of(quantized.path).items() if "W_k" in name}
    assert weights["ConvBnFusion_W_k2"] == np.float32
    assert np.int8 in weights.values()
    node, kind, reason = quantized.steps[-1].measured["float_ops"][0]
    assert (node, kind) == ("conv_2", "Conv")
    assert reason.startswith("kept in floating point")


def test_an_unknown_node_to_keep_is_told_its_nearest(tmp_path: Path, conv: Artifact, digits: Samples) -> None:
    spec = steps.Quantize(keep=("conv_22",))
    with pytest.raises(UsageError, match="no node is named 'conv_22'") as caught:
        quantize_static(conv, digits, tmp_path / "model.onnx", spec=spec)
    assert "conv_2" in str(caught.value.expected)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
def test_a_tensor_that_is_always_zero_gets_a_valid_scale(tmp_path: Path, dialect: str) -> None:
    weights = {"w1": np.ones((64, 32)), "low": np.full(32, -1e4), "w2": np.ones((32, 16))}
    nodes = [
        helper.make_node("MatMul", ["image", "w1"], ["h"], "one"),
        helper.make_node("Add", ["h", "low"], ["lower"], "lower"),
        helper.make_node("Relu", ["lower"], ["dead"], "dead"),
        helper.make_node("MatMul", ["dead", "w2"], ["probabilities"], "two"),
    ]
    model = make_model(nodes, weights, image_shape=["batch", 64], output=("probabilities", ["batch", 16]))
    artifact = write_artifact(model, tmp_path / "dead.onnx")
    flat = split_digits().train_images[:20].reshape(-1, 64)
    samples = samples_of(tmp_path / "flat.npz", artifact.inputs, flat)

    quantized = quantize_static(artifact, samples, tmp_path / "model.onnx", dialect=dialect)

    scales = {name: array for name, array in arrays_of(quantized.path).items() if "_scale" in name}
    assert all(np.isfinite(array).all() and (array > 0).all() for array in scales.values())
    np.testing.assert_array_equal(open_session(quantized.path).run({"image": flat})["probabilities"], 0.0)


def test_calibrators_change_the_scales(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"w": rng.normal(size=(32, 32))},
        inputs={"x": ["batch", 32]},
        outputs={"y": ["batch", 32]},
    )
    artifact = write_artifact(model, tmp_path / "one.onnx")
    values = rng.normal(size=(400, 32)).astype(np.float32)
    values[0, 0] = 60.0
    samples = samples_of(tmp_path / "x.npz", artifact.inputs, values)
    scales = {}
    for calibrator in ("minmax", "entropy", "percentile", "mse"):
        spec = steps.Quantize(calibrator=calibrator, percentile=99.9)
        quantized = quantize_static(
            artifact, samples, tmp_path / "model.onnx", spec=spec, ranges_folder=tmp_path / "ranges"
        )
        scales[calibrator] = float(arrays_of(quantized.path)["x_scale"])
        assert quantized.steps[-1].options["calibrator"] == calibrator
    assert scales["minmax"] == pytest.approx((60.0 - values.min()) / 255, rel=1e-5)
    assert all(scales[name] < scales["minmax"] / 2 for name in ("entropy", "percentile"))
    assert Counter(scales.values()).most_common(1)[0][1] <= 2
