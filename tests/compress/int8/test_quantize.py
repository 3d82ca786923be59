"""INT8 on real digits: the file shrinks, the arithmetic really is INT8, the accuracy holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from digits_models import (
    conv_model,
    make_model,
    mlp_model,
    split_digits,
    write_artifact,
    write_samples,
)
from quantize_models import attention_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.int8.arithmetic import detect_arithmetic
from tritonsmith.compress.int8.audit import audit_int8
from tritonsmith.compress.int8.quantize import default_int8_method, quantize_dynamic, quantize_static
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.samples import Samples, load_samples


@pytest.fixture
def conv(tmp_path: Path) -> Artifact:
    return write_artifact(conv_model(), tmp_path / "conv.onnx")


@pytest.fixture
def calibration(tmp_path: Path, conv: Artifact) -> Samples:
    path = write_samples(tmp_path / "calibration.npz", split_digits().train_images[:200, None])
    return load_samples(path, conv.inputs)


def accuracy(path: Path, engine: str) -> float:
    digits = split_digits()
    outputs = open_session(path, engine=engine).run({"image": digits.test_images[:, None]})
    return float((outputs["probabilities"].argmax(axis=1) == digits.test_labels).mean())


@pytest.mark.parametrize("dialect", ["onnxruntime", "openvino"])
def test_static_int8_shrinks_and_keeps_accuracy(
    tmp_path: Path, conv: Artifact, calibration: Samples, dialect: str
) -> None:
    quantized = quantize_static(conv, calibration, tmp_path / "model.onnx", dialect=dialect)
    step = quantized.steps[-1]

    assert quantized.precision == "int8"
    assert (quantized.inputs, quantized.outputs) == (conv.inputs, conv.outputs)
    assert step.bytes_before == conv.path.stat().st_size
    assert step.bytes_after == quantized.path.stat().st_size
    assert step.bytes_after < step.bytes_before / 2
    assert (step.measured["int8_ops"], step.measured["ops"]) == (3, 3)
    assert accuracy(conv.path, dialect) > 0.97
    assert accuracy(quantized.path, dialect) > accuracy(conv.path, dialect) - 0.01
    for size in (1, 2, 3, 7):
        outputs = open_session(quantized.path, engine=dialect).run(
            {"image": np.zeros((size, 1, 8, 8), np.float32)}
        )
        assert outputs["probabilities"].shape == (size, 10)


def test_weights_are_stored_as_int8_per_channel(tmp_path: Path, conv: Artifact, calibration: Samples) -> None:
    quantize_static(conv, calibration, tmp_path / "model.onnx")
    graph = onnx.load(str(tmp_path / "model.onnx")).graph

    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    assert [tensor.data_type for tensor in matrices] == [TensorProto.INT8] * 3
    scales = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name.endswith("_scale")}
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    channels = [scales[readers[tensor.name].input[1]] for tensor in matrices]
    assert sorted(list(dims) for dims in channels) == [[10], [16], [32]]


def test_ranges_do_not_depend_on_how_many_chunks_they_come_from(
    tmp_path: Path, conv: Artifact, calibration: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize_static(conv, calibration, tmp_path / "whole.onnx")
    monkeypatch.setattr("tritonsmith.compress.calibration.CHUNK_SAMPLES", 1)
    chunked = quantize_static(conv, calibration, tmp_path / "chunked.onnx")
    expected, found = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(artifact.path)).graph.initializer}
        for artifact in (whole, chunked)
    )
    scales = [name for name in expected if name.endswith("_scale")]
    assert len(scales) >= 9
    for name in scales:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_what_runs_in_int8_is_read_from_the_optimised_graph(
    tmp_path: Path, conv: Artifact, calibration: Samples
) -> None:
    before = audit_int8(conv.path, engine="onnxruntime")
    assert (before.int8_ops, before.ops) == (0, 3)

    quantize_static(conv, calibration, tmp_path / "model.onnx")
    after = audit_int8(tmp_path / "model.onnx", engine="onnxruntime")
    assert after.by_type == {"QLinearConv": 2, "QGemm": 1}


def test_batch_normalisation_is_folded_and_the_last_product_gives_floats(
    tmp_path: Path, conv: Artifact, calibration: Samples
) -> None:
    quantize_static(conv, calibration, tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    kinds = Counter(node.op_type for node in model.graph.node)

    assert kinds["BatchNormalization"] == 0
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    maker = next(node for node in model.graph.node if softmax.input[0] in node.output)
    assert maker.op_type == "Gemm"
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert model.ir_version == conv_model().ir_version
    onnx.checker.check_model(model, full_check=True)


def test_an_old_opset_is_raised_so_that_weights_stay_per_channel(
    tmp_path: Path, calibration: Samples
) -> None:
    old = write_artifact(conv_model(opset=11), tmp_path / "old.onnx")
    quantized = quantize_static(old, calibration, tmp_path / "model.onnx")
    model = onnx.load(str(quantized.path))

    assert model.opset_import[0].version == 13
    scales = [tensor for tensor in model.graph.initializer if "k2" in tensor.name and "scale" in tensor.name]
    assert [list(tensor.dims) for tensor in scales] == [[32]]
    assert accuracy(quantized.path, "onnxruntime") > 0.97


def test_a_model_without_batch_axis_is_calibrated_sample_by_sample(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(8, 4))}
    nodes = [helper.make_node("MatMul", ["image", "w"], ["probabilities"], name="product")]
    model = make_model(nodes, weights, image_shape=[8, 8], output=("probabilities", [8, 4]))
    artifact = write_artifact(model, tmp_path / "single.onnx")
    path = write_samples(tmp_path / "calibration.npz", split_digits().train_images[:32])
    samples = load_samples(path, artifact.inputs, batched=False)

    quantized = quantize_static(artifact, samples, tmp_path / "model.onnx")

    image = split_digits().test_images[0]
    found = open_session(quantized.path).run({"image": image})["probabilities"]
    np.testing.assert_allclose(found, image @ weights["w"], atol=0.05)


def test_a_kill_while_quantizing_leaves_what_was_there(
    tmp_path: Path, conv: Artifact, calibration: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.onnx"
    out.write_bytes(b"what was there")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tritonsmith.compress.int8.static.audit_quantized", die)
    with pytest.raises(KeyboardInterrupt):
        quantize_static(conv, calibration, out)
    assert out.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.npz", "conv.onnx", "model.onnx"]


def test_a_graph_without_products_is_refused(tmp_path: Path, calibration: Samples) -> None:
    nodes = [helper.make_node("Relu", ["image"], ["probabilities"], name="relu")]
    model = make_model(
        nodes, {}, image_shape=["batch", 1, 8, 8], output=("probabilities", ["batch", 1, 8, 8])
    )
    artifact = write_artifact(model, tmp_path / "relu.onnx")
    with pytest.raises(CompressionError, match="nothing that INT8 would help") as caught:
        quantize_static(artifact, calibration, tmp_path / "model.onnx")
    assert caught.value.found == "operators Relu"
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_that_onnx_runtime_refuses_is_named(tmp_path: Path, calibration: Samples) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(conv_model())
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    node.op_type, node.domain = "Gemm", "nowhere"
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    artifact = write_artifact(model, tmp_path / "odd.onnx")
    with pytest.raises(CompressionError, match=r"ONNX Runtime refuses .*odd.onnx"):
        quantize_static(artifact, calibration, tmp_path / "model.onnx")


def test_calibration_samples_that_are_all_the_same_are_refused(tmp_path: Path, conv: Artifact) -> None:
    path = write_samples(tmp_path / "same.npz", np.full((20, 1, 8, 8), 0.5, np.float32))
    with pytest.raises(SamplesError, match="all the same"):
        quantize_static(conv, load_samples(path, conv.inputs), tmp_path / "model.onnx")


def test_an_unknown_dialect_is_wrong_usage(tmp_path: Path, conv: Artifact, calibration: Samples) -> None:
    with pytest.raises(UsageError, match="no dialect is named 'tflite'"):
        quantize_static(conv, calibration, tmp_path / "model.onnx", dialect="tflite")


@pytest.mark.parametrize(
    ("flags", "vnni", "reduce_range"),
    [("fpu avx2 avx512_vnni", True, False), ("fpu avx2 avx_vnni", True, False), ("fpu avx2", False, True)],
)
def test_without_vnni_weights_keep_seven_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, vnni: bool, reduce_range: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    found = detect_arithmetic(cpuinfo)
    assert (found.vnni, found.reduce_range, found.activations) == (vnni, reduce_range, "uint8")


def test_on_arm_activations_are_symmetric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = detect_arithmetic(tmp_path / "absent")
    assert (found.activations, found.reduce_range) == ("int8", False)


def test_a_transformer_is_quantized_dynamically_without_data(tmp_path: Path) -> None:
    artifact = write_artifact(attention_model(), tmp_path / "attention.onnx")
    tokens = np.random.default_rng(1).integers(0, 100, (3, 9))
    expected = open_session(artifact.path).run({"tokens": tokens})["hidden"]

    quantized = quantize_dynamic(artifact, tmp_path / "model.onnx")

    found = open_session(quantized.path).run({"tokens": tokens})["hidden"]
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.999
    step = quantized.steps[-1]
    assert (step.measured["int8_ops"], step.measured["ops"]) == (3, 5)
    assert step.bytes_after < step.bytes_before / 2
    assert step.options["per_channel"] is True


def test_static_int8_leaves_the_products_of_attention_in_floating_point(tmp_path: Path) -> None:
    artifact = write_artifact(attention_model(), tmp_path / "attention.onnx")
    tokens = np.random.default_rng(1).integers(0, 100, (40, 9))
    np.savez(tmp_path / "calibration.npz", tokens=tokens)
    samples = load_samples(tmp_path / "calibration.npz", artifact.inputs)

    quantized = quantize_static(artifact, samples, tmp_path / "model.onnx")

    measured = quantized.steps[-1].measured
    assert (measured["int8_ops"], measured["ops"]) == (3, 5)
    found = open_session(quantized.path).run({"tokens": tokens})["hidden"]
    expected = open_session(artifact.path).run({"tokens": tokens})["hidden"]
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.995


def test_the_default_method_follows_graph_and_engine(tmp_path: Path) -> None:
    attention = write_artifact(attention_model(), tmp_path / "attention.onnx")
    conv = write_artifact(conv_model(), tmp_path / "conv.onnx")
    mlp = write_artifact(mlp_model(), tmp_path / "mlp.onnx")

    assert default_int8_method(attention) == "dynamic"
    assert default_int8_method(attention, "openvino") == "static"
    assert default_int8_method(conv) == "static"
    assert default_int8_method(mlp) == "static"


def test_dynamic_int8_that_openvino_would_not_run_in_int8_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(attention_model(), tmp_path / "attention.onnx")
    with pytest.raises(CompressionError, match="openvino would run nothing of it in INT8"):
        quantize_dynamic(artifact, tmp_path / "model.onnx", engine="openvino")
    assert not (tmp_path / "model.onnx").exists()


def test_an_lstm_is_quantized_dynamically(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hidden, width = 16, 8
    weights = {
        "w": rng.normal(0, 0.3, (1, 4 * hidden, width)),
        "r": rng.normal(0, 0.3, (1, 4 * hidden, hidden)),
        "b": rng.normal(0, 0.1, (1, 8 * hidden)),
    }
    nodes = [
        helper.make_node("Transpose", ["image"], ["steps"], name="transpose", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r", "b"], ["", "last", ""], name="lstm", hidden_size=hidden),
        helper.make_node("Transpose", ["last"], ["probabilities"], name="back", perm=[1, 0, 2]),
    ]
    output: tuple[str, list[int | str]] = ("probabilities", ["batch", 1, hidden])
    model = make_model(nodes, weights, image_shape=["batch", 8, width], output=output)
    artifact = write_artifact(model, tmp_path / "lstm.onnx")
    images = split_digits().test_images[:16]
    expected = open_session(artifact.path).run({"image": images})["probabilities"]

    assert default_int8_method(artifact) == "dynamic"
    quantized = quantize_dynamic(artifact, tmp_path / "model.onnx")

    found = open_session(quantized.path).run({"image": images})["probabilities"]
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert quantized.steps[-1].measured["ops_by_type"] == {"DynamicQuantizeLSTM": 1}
