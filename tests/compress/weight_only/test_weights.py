"""Weights in blocks: really INT4 in the file, and what engines compute with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from block_models import (
    CLASSES,
    INNER,
    ROWS,
    WIDTH,
    artifact_of,
    reader_ids,
    reader_model,
    reader_scores,
    reader_weights,
    samples_of,
)
from onnx_models import model_from_text
from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.opset import raise_opset
from tritonsmith.compress.steps import QuantizeWeights
from tritonsmith.compress.weight_only.quantize import apply_weights
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.targets import Server
from tritonsmith.samples import Samples

Array = NDArray[Any]

OLD, NEW = "24.10", "26.08"  # ONNX Runtime 1.19, which casts no INT4, and 1.28
STORED = {"table": (ROWS, WIDTH), "w1": (WIDTH, INNER), "w2": (INNER, CLASSES)}


def quantized(
    tmp_path: Path,
    spec: QuantizeWeights,
    model: onnx.ModelProto | None = None,
    *,
    server: str = NEW,
    **material: Any,
) -> Artifact:
    artifact = artifact_of(model or reader_model(), tmp_path / "fp32.onnx")
    return apply_weights(
        spec,
        artifact,
        Material(teacher=artifact, convert=ConvertOptions(server=server), **material),
        tmp_path / "out" / "model.onnx",
        checkpoint=tmp_path / "checkpoint",
    )


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(str(path)).graph.initializer}


def stored_codes(path: Path, name: str, shape: tuple[int, int]) -> Array:
    """Codes as they lie in the file: INT4 or INT8, or two nibbles a byte, each 8 too large."""
    tensors = initializers(path)
    kinds = (TensorProto.INT4, TensorProto.INT8)
    stem = f"{name}_transposed" if f"{name}_transposed_scales" in tensors else name
    for suffix in ("_int4", "_int8"):
        if f"{stem}{suffix}" in tensors:
            tensor = tensors[f"{stem}{suffix}"]
            assert tensor.data_type in kinds
            return numpy_helper.to_array(tensor).astype(np.int64)
    packed = numpy_helper.to_array(tensors[f"{stem}_nibbles"]).astype(np.int64)
    return np.concatenate([packed % 16, packed // 16])[: shape[0] * shape[1]].reshape(shape) - 8


def stored_weights(path: Path, spec: QuantizeWeights) -> dict[str, Array]:
    """The weights of the reader as the file stands for them, from its initializers alone."""
    tensors = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(path).items()}
    weights: dict[str, Array] = dict(reader_weights())
    for name, shape in STORED.items():
        stem = f"{name}_transposed" if name == "w2" else name
        codes = stored_codes(path, name, shape)
        scales = tensors[f"{stem}_scales"].astype(np.float64)
        along = 1 if name == "table" else 0
        if f"{stem}_multipliers" in tensors:
            steps = np.repeat(tensors[f"{stem}_multipliers"].astype(np.float64), spec.block, axis=along)
            weights[name] = codes * steps * (scales.reshape(-1, 1) if along == 1 else scales)
        elif spec.arithmetic == "float":
            weights[name] = codes * np.repeat(scales, spec.block, axis=along)
        else:
            weights[name] = codes * scales
    weights["w2"] = weights["w2"].T
    return weights


@pytest.mark.parametrize("bits", [4, 8])
def test_float_arithmetic_computes_with_what_is_stored(tmp_path: Path, bits: int) -> None:
    spec = QuantizeWeights(bits=bits, block=32)
    artifact = quantized(tmp_path, spec)
    weights = stored_weights(artifact.path, spec)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # nothing rounded inside
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    exact = onnxruntime.InferenceSession(str(artifact.path), options)
    for count in (1, 2, 3, 7):
        ids = reader_ids(count)
        expected = reader_scores(ids, weights)
        np.testing.assert_allclose(exact.run(None, {"ids": ids})[0], expected, atol=1e-4)
        served = open_session(artifact.path).run({"ids": ids})["scores"]
        np.testing.assert_allclose(served, expected, atol=0.05)  # MatMulNBits rounds activations to INT8
    for name, limit in (("table", 0.02), ("w1", 0.02), ("w2", 0.02)):
        original = reader_weights()[name]
        error = np.square(weights[name] - original).mean() / np.square(original).mean()
        assert error < (limit if bits == 4 else limit / 100)


@pytest.mark.parametrize("server", [OLD, NEW])
def test_integer_arithmetic_computes_with_what_is_stored(tmp_path: Path, server: str) -> None:
    spec = QuantizeWeights(arithmetic="int8", block=16)
    artifact = quantized(tmp_path, spec, server=server)
    weights = stored_weights(artifact.path, spec)
    session = open_session(artifact.path)
    for count in (1, 2, 3, 7):
        ids = reader_ids(count)
        found = session.run({"ids": ids})["scores"]
        # What is left is the rounding of activations to uint8.
        np.testing.assert_allclose(found, reader_scores(ids, weights), atol=0.04)
    assert artifact.steps[-1].measured["int8_ops"] == 2
    assert artifact.steps[-1].measured["ops"] == 2


def test_products_in_integers_are_exact(tmp_path: Path) -> None:
    """Activations that uint8 holds exactly leave nothing but the weights to differ."""
    weight = np.random.default_rng(5).normal(size=(64, 32)).astype(np.float32)
    model = model_from_text(
        "product (float[batch, 64] x) => (float[batch, 32] y) { y = MatMul(x, w) }", {"w": weight}
    )
    spec = QuantizeWeights(arithmetic="int8")
    artifact = quantized(tmp_path, spec, model, server=OLD)
    tensors = {name: numpy_helper.to_array(t) for name, t in initializers(artifact.path).items()}
    packed = tensors["w_nibbles"].astype(np.int64)
    codes = np.concatenate([packed % 16, packed // 16]).reshape(64, 32) - 8
    stored = codes * np.repeat(tensors["w_multipliers"].astype(np.int64), 32, axis=0) * tensors["w_scales"]
    x = np.random.default_rng(6).integers(0, 256, (5, 64)).astype(np.float32)
    x[:, 0], x[:, 1] = 0, 255  # the range of uint8 itself
    found = open_session(artifact.path).run({"x": x})["y"]
    np.testing.assert_allclose(found, x.astype(np.float64) @ stored, rtol=1e-5, atol=1e-3)


def test_files_hold_int4_and_shrink(tmp_path: Path) -> None:
    before = len(reader_model().SerializeToString())
    weights = ROWS * WIDTH + WIDTH * INNER + INNER * CLASSES
    for spec, server in (
        (QuantizeWeights(), NEW),
        (QuantizeWeights(arithmetic="int8"), NEW),
        (QuantizeWeights(arithmetic="int8"), OLD),
    ):
        artifact = quantized(tmp_path, spec, server=server)
        step = artifact.steps[-1]
        assert artifact.precision == "int4"
        assert (step.bytes_before, step.bytes_after) == (before, artifact.path.stat().st_size)
        assert step.bytes_after < before / 4
        kinds: Counter[int] = Counter()
        for tensor in initializers(artifact.path).values():
            kinds[tensor.data_type] += int(np.prod(tensor.dims))
        if server == NEW:
            assert kinds[TensorProto.INT4] == weights
            assert step.measured["elements"]["int4"] == weights  # type: ignore[index, call-overload]
        else:
            assert kinds[TensorProto.UINT8] == weights / 2 + 1  # and the shift by 4 bits


def test_the_old_server_gets_no_opset_that_it_does_not_read(tmp_path: Path) -> None:
    for spec, server, opset in (
        (QuantizeWeights(), OLD, 21),
        (QuantizeWeights(arithmetic="int8"), OLD, 17),
        (QuantizeWeights(arithmetic="int8"), NEW, 21),
    ):
        model = onnx.load(str(quantized(tmp_path, spec, server=server).path))
        assert onnx_model.opset_of(model) == opset
        assert model.ir_version <= 10
        casts = {
            tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4
        } & {name for node in model.graph.node if node.op_type == "Cast" for name in node.input}
        assert bool(casts) == (server == NEW)


def test_onnx_runtime_multiplies_narrow_and_looks_up_rows_only(tmp_path: Path) -> None:
    artifact = quantized(tmp_path, QuantizeWeights())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(artifact.path), options)
    graph = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulNBits"] == 2
    assert kinds["Gather"] == 3
    assert kinds["DequantizeLinear"] == 0  # else the whole table or weight would be widened in each run


def test_openvino_reads_the_blocks(tmp_path: Path) -> None:
    spec = QuantizeWeights()
    artifact = quantized(tmp_path, spec, engine="openvino")
    ids = reader_ids(3)
    found = open_session(artifact.path, engine="openvino").run({"ids": ids})["scores"]
    np.testing.assert_allclose(found, reader_scores(ids, stored_weights(artifact.path, spec)), atol=0.02)


@pytest.mark.parametrize("arithmetic", ["float", "int8"])
def test_the_last_block_may_be_shorter(tmp_path: Path, arithmetic: str) -> None:
    width = 40
    weights = reader_weights(width)
    artifact = quantized(tmp_path, QuantizeWeights(arithmetic=arithmetic), reader_model(width))
    ids = reader_ids(4)
    found = open_session(artifact.path).run({"ids": ids})["scores"]
    expected = reader_scores(ids, weights)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def test_openvino_is_refused_blocks_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="do not divide weight 'w1'"):
        quantized(tmp_path, QuantizeWeights(), reader_model(40), engine="openvino")


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    weight = np.random.default_rng(5).normal(size=(64, 64)).astype(np.float32)
    model = model_from_text(
        "twice (float[batch, 64] x) => (float[batch, 64] y) {"
        " a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  d = Relu(c)  y = MatMul(d, same) }",
        {"w": weight, "same": weight},
    )
    for arithmetic in ("float", "int8"):
        artifact = quantized(tmp_path, QuantizeWeights(arithmetic=arithmetic), model)
        narrow = [t for t in initializers(artifact.path).values() if t.data_type == TensorProto.INT4]
        assert [list(tensor.dims) for tensor in narrow] == [[64, 64]]
        assert open_session(artifact.path).run({"x": np.ones((2, 64), np.float32)})["y"].shape == (2, 64)


def test_what_is_kept_or_cannot_be_stored_is_listed(tmp_path: Path) -> None:
    model = reader_model()
    for node in model.graph.node:
        node.name = f"{node.op_type}_node"
    spec = QuantizeWeights(keep=("MatMul_node",), embeddings=False)
    artifact = quantized(tmp_path, spec, model)
    tensors = initializers(artifact.path)
    assert {tensors["w1"].data_type, tensors["table"].data_type} == {TensorProto.FLOAT}
    assert tensors["w2_transposed_int4"].data_type == TensorProto.INT4
    left = artifact.steps[-1].measured["left"]
    assert left == ["table: embeddings are left out", "w1: kept as asked"]
    with pytest.raises(UsageError, match="no node is named 'MatMul_nod'"):
        quantized(tmp_path, QuantizeWeights(keep=("MatMul_nod",)), model)


def test_a_model_without_such_weights_is_refused(tmp_path: Path) -> None:
    convolution = model_from_text(
        "conv (float[batch, 16, 8, 8] x) => (float[batch, 32, 6, 6] y) { y = Conv(x, w) }",
        {"w": np.ones((32, 16, 3, 3), np.float32)},
    )
    with pytest.raises(CompressionError, match="no weight that could be stored in blocks") as caught:
        quantized(tmp_path, QuantizeWeights(), convolution)
    assert "w: it has 4 axes" in str(caught.value)
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("spec", "engine", "words"),
    [
        (QuantizeWeights(bits=3), "onnxruntime", "weights of 3 bits"),
        (QuantizeWeights(block=48), "onnxruntime", "blocks of 48"),
        (QuantizeWeights(arithmetic="int4"), "onnxruntime", "no arithmetic is named 'int4'"),
        (QuantizeWeights(arithmetic="int8"), "openvino", "widen INT8 products"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, spec: QuantizeWeights, engine: str, words: str) -> None:
    with pytest.raises((UsageError, CompressionError), match=words):
        quantized(tmp_path, spec, engine=engine)


@pytest.mark.parametrize("spec", [QuantizeWeights(smooth=0.5), QuantizeWeights(compensate=True)])
def test_smoothing_and_compensation_need_calibration_data(tmp_path: Path, spec: QuantizeWeights) -> None:
    with pytest.raises(SamplesError, match="needs calibration data"):
        quantized(tmp_path, spec)


def test_an_opset_that_cannot_be_raised_is_refused() -> None:
    model = model_from_text(
        "odd (float[batch, 4] x) => (float[batch, 4] y) { y = Add(x, nowhere) }", opset=17
    )
    with pytest.raises(CompressionError, match=r"odd\.onnx is of an opset too old") as caught:
        raise_opset(model, 21, "odd.onnx")
    assert "opset 17" in str(caught.value)


def test_a_server_that_reads_no_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Server(release="23.12", onnxruntime="1.16.3", opset=19, ir_version=9)
    monkeypatch.setattr("tritonsmith.ingest.targets.SERVERS", {"23.12": old})
    with pytest.raises(CompressionError, match=r"Triton 23\.12 .* reads no weights in blocks"):
        quantized(tmp_path, QuantizeWeights(), server="23.12")
    artifact = quantized(tmp_path, QuantizeWeights(arithmetic="int8"), server="23.12")
    assert onnx_model.opset_of(onnx.load(str(artifact.path))) == 17


def correlated_samples(count: int) -> Samples:
    """Inputs of few directions, as real activations are: rounding errors can make up for each other."""
    random = np.random.default_rng(8)
    basis = random.normal(size=(6, 64))
    x = random.normal(size=(count, 6)) @ basis + 0.1 * random.normal(size=(count, 64))
    return samples_of(x=x.astype(np.float32))


def test_compensation_lowers_the_error_of_products(tmp_path: Path) -> None:
    weight = np.random.default_rng(5).normal(size=(64, 48)).astype(np.float32)
    model = model_from_text(
        "product (float[batch, 64] x) => (float[batch, 48] y) { y = MatMul(x, w) }", {"w": weight}
    )
    held_out = correlated_samples(300).arrays["x"][200:]
    calibration = samples_of(x=correlated_samples(300).arrays["x"][:200])
    errors = []
    for compensate in (False, True):
        spec = QuantizeWeights(compensate=compensate)
        artifact = quantized(tmp_path, spec, model, calibration=calibration)
        found = open_session(artifact.path).run({"x": held_out})["y"]
        errors.append(np.square(found - held_out @ weight).mean())
    assert errors[1] < errors[0] / 3


def test_smoothing_spreads_outliers(tmp_path: Path) -> None:
    weight = np.random.default_rng(5).normal(size=(64, 48)).astype(np.float32)
    model = model_from_text(
        "product (float[batch, 64] x) => (float[batch, 48] y) { y = MatMul(x, w) }", {"w": weight}
    )
    x = np.random.default_rng(6).normal(size=(200, 64)).astype(np.float32)
    x[:, 3] *= 200
    errors = []
    for smooth in (None, 0.5):
        spec = QuantizeWeights(bits=8, arithmetic="int8", smooth=smooth)
        artifact = quantized(tmp_path, spec, model, calibration=samples_of(x=x[:100]))
        found = open_session(artifact.path).run({"x": x[100:]})["y"]
        errors.append(np.square(found - x[100:] @ weight).mean())
    assert errors[1] < errors[0] / 10


def test_training_for_the_blocks_brings_the_answers_back(tmp_path: Path) -> None:
    ids = reader_ids(700, seed=1)
    held_out = reader_ids(300, seed=2)
    expected = reader_scores(held_out, reader_weights())
    errors = []
    for epochs in (0, 6):
        spec = QuantizeWeights(arithmetic="int8", epochs=epochs, learning_rate=2e-3, batch_size=32)
        artifact = quantized(tmp_path, spec, training=samples_of(ids=ids))
        found = open_session(artifact.path).run({"ids": held_out})["scores"]
        errors.append(np.square(found - expected).mean())
    assert errors[1] < errors[0] / 2
    training = artifact.steps[-1].measured["training"]
    assert training["epochs"] == 6  # type: ignore[index, call-overload]
    before = artifact.path.read_bytes()
    again = quantized(tmp_path, spec, training=samples_of(ids=ids))  # as after a kill behind the last epoch
    assert again.steps[-1].measured["training"]["resumed_from"] == 6  # type: ignore[index, call-overload]
    assert again.path.read_bytes() == before
    weights = stored_weights(artifact.path, spec)
    close = open_session(artifact.path).run({"ids": held_out})["scores"]
    np.testing.assert_allclose(
        close, reader_scores(held_out, {**weights, **biases(artifact.path)}), atol=0.05
    )


def biases(path: Path) -> dict[str, Array]:
    return {name: numpy_helper.to_array(t) for name, t in initializers(path).items() if name in ("b1", "b2")}


def test_weights_past_two_gigabytes_lie_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonsmith.onnx_model.EXTERNAL_DATA_THRESHOLD_BYTES", 4000)
    monkeypatch.setattr("tritonsmith.onnx_model.EMBEDDED_BYTES", 100)
    artifact = quantized(tmp_path, QuantizeWeights())
    assert [file.name for file in onnx_model.model_files(artifact.path)] == ["model.onnx", "model.onnx.data"]
    assert open_session(artifact.path).run({"ids": reader_ids(2)})["scores"].shape == (2, CLASSES)
