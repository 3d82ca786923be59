"""SavedModel folders from Keras 3, Keras 2 and plain TensorFlow, against what they compute."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import keras_models
from tritonsmith.engines import open_session
from tritonsmith.errors import SourceError
from tritonsmith.ingest import convert
from tritonsmith.ingest.tensorflow_framework import import_framework

WORDS = np.array([1.5, -2.0, 0.25], np.float32)


@pytest.fixture(scope="session")
def tf() -> Any:
    return import_framework("tensorflow", Path("a test"))


@pytest.fixture
def polynomial(tf: Any, tmp_path: Path) -> Path:
    """Two inputs and two outputs: scaled = x * [1.5, -2, 0.25] + shift, total = the sum of its rows."""

    class Polynomial(tf.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.factors = tf.Variable(WORDS)

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, 3), tf.float32, name="x"),
                tf.TensorSpec((None, 1), tf.int32, name="shift"),
            ]
        )
        def serve(self, x: Any, shift: Any) -> Any:
            scaled = x * self.factors + tf.cast(shift, tf.float32)
            return {"scaled": scaled, "total": tf.reduce_sum(scaled, axis=1)}

    module = Polynomial()
    tf.saved_model.save(module, str(tmp_path / "polynomial"), signatures={"serving_default": module.serve})
    return tmp_path / "polynomial"


def save_function(tf: Any, folder: Path, function: Any, *specs: Any, key: str = "serving_default") -> Path:
    module = tf.Module()
    module.serve = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(folder), signatures={key: module.serve})
    return folder


def test_module_keeps_the_keys_of_its_signature(polynomial: Path, tmp_path: Path) -> None:
    artifact = convert(str(polynomial), tmp_path / "model.onnx")

    assert [str(spec) for spec in artifact.inputs] == ["shift: int32[batch, 1]", "x: float32[batch, 3]"]
    assert [str(spec) for spec in artifact.outputs] == ["scaled: float32[batch, 3]", "total: float32[batch]"]
    assert artifact.batched
    x, shift = np.array([[1, 2, 4], [0, 1, 0]], np.float32), np.array([[10], [-1]], np.int32)
    answer = open_session(artifact.path).run({"x": x, "shift": shift})
    np.testing.assert_allclose(answer["scaled"], [[11.5, 6, 11], [-1, -3, -1]], rtol=1e-6)
    np.testing.assert_allclose(answer["total"], [28.5, -5], rtol=1e-6)


def test_keras_3_export(tf: Any, tmp_path: Path) -> None:
    keras = import_framework("keras", tmp_path)
    model = keras_models.randomised(keras_models.recurrent(keras))
    model.export(tmp_path / "exported", verbose=False)

    artifact = convert(str(tmp_path / "exported"), tmp_path / "model.onnx")

    assert [str(spec) for spec in artifact.inputs] == ["series: float32[batch, sequence, 3]"]
    assert [spec.name for spec in artifact.outputs] == ["output_0", "output_1", "output_2"]
    assert Counter(node.op_type for node in onnx.load(artifact.path).graph.node)["LSTM"] == 2
    series = np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
    answer = open_session(artifact.path).run({"series": series})
    for name, expected in zip(("output_0", "output_1", "output_2"), model(series), strict=True):
        np.testing.assert_allclose(answer[name], expected, atol=1e-5)


def test_keras_2_model(tf: Any, tmp_path: Path) -> None:
    keras = import_framework("tf_keras", tmp_path)
    model = keras_models.randomised(keras_models.conv2d(keras))
    tf.saved_model.save(model, str(tmp_path / "saved"))

    artifact = convert(str(tmp_path / "saved"), tmp_path / "model.onnx")

    assert [str(spec) for spec in artifact.inputs] == ["image: float32[batch, 8, 8, 2]"]
    assert [str(spec) for spec in artifact.outputs] == ["label: float32[batch, 3]"]
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 2)).astype(np.float32)
    np.testing.assert_allclose(
        open_session(artifact.path).run({"image": image})["label"], model(image), atol=1e-5
    )


def test_signature_without_a_batch_axis(tf: Any, tmp_path: Path) -> None:
    source = save_function(
        tf,
        tmp_path / "saved",
        lambda vector, gain: {"scaled": vector * gain, "largest": tf.reduce_max(vector)},
        tf.TensorSpec((4,), tf.float32, name="vector"),
        tf.TensorSpec((), tf.float32, name="gain"),
    )

    artifact = convert(str(source), tmp_path / "model.onnx")

    assert not artifact.batched
    assert [str(spec) for spec in artifact.inputs] == ["gain: float32[]", "vector: float32[4]"]
    assert [str(spec) for spec in artifact.outputs] == ["largest: float32[]", "scaled: float32[4]"]
    answer = open_session(artifact.path).run(
        {"vector": np.array([1, 5, -2, 0], np.float32), "gain": np.float32(3)}
    )
    assert answer["largest"] == 5
    np.testing.assert_array_equal(answer["scaled"], [3, 15, -6, 0])


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float64", "float16"])
def test_data_types_are_kept(tf: Any, tmp_path: Path, dtype: str) -> None:
    source = save_function(
        tf,
        tmp_path / "saved",
        lambda left, right: {"chosen": tf.where(right, left, tf.zeros_like(left))},
        tf.TensorSpec((None, 2), tf.as_dtype(dtype), name="left"),
        tf.TensorSpec((None, 2), tf.bool, name="right"),
    )

    artifact = convert(str(source), tmp_path / "model.onnx")

    assert [spec.dtype for spec in (*artifact.inputs, *artifact.outputs)] == [dtype, "bool", dtype]


def test_captured_constants_are_weights_not_inputs(tf: Any, tmp_path: Path) -> None:
    table = tf.constant(np.arange(400, dtype=np.float32).reshape(200, 2))  # too large to be inlined
    module = tf.Module()
    module.table = table
    module.serve = tf.function(
        lambda row: {"pair": tf.gather(table, row)},
        input_signature=[tf.TensorSpec((None,), tf.int32, name="row")],
    )
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=module.serve)

    artifact = convert(str(tmp_path / "saved"), tmp_path / "model.onnx")

    assert [spec.name for spec in artifact.inputs] == ["row"]
    answer = open_session(artifact.path).run({"row": np.array([3, 199], np.int32)})
    np.testing.assert_array_equal(answer["pair"], [[6, 7], [398, 399]])


def test_only_signature_is_served_whatever_its_name(tf: Any, tmp_path: Path) -> None:
    spec = tf.TensorSpec((None, 1), tf.float32, name="x")
    source = save_function(tf, tmp_path / "saved", lambda x: {"y": x + 1}, spec, key="predict")

    artifact = convert(str(source), tmp_path / "model.onnx")

    assert artifact.steps[0].options["signature"] == "predict"


def test_several_signatures_without_a_default_are_refused(tf: Any, tmp_path: Path) -> None:
    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": x}, input_signature=[tf.TensorSpec((None,), tf.float32)])
    signatures = {"encode": module.serve, "decode": module.serve}
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=signatures)

    with pytest.raises(SourceError, match="which of its functions") as caught:
        convert(str(tmp_path / "saved"), tmp_path / "model.onnx")

    assert caught.value.found == "signatures decode, encode"


def test_no_signature_is_refused(tf: Any, tmp_path: Path) -> None:
    tf.saved_model.save(tf.Module(), str(tmp_path / "saved"))

    with pytest.raises(SourceError, match="which of its functions") as caught:
        convert(str(tmp_path / "saved"), tmp_path / "model.onnx")

    assert caught.value.found == "no signature"


def test_graph_that_writes_a_file_is_refused_and_not_run(tf: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def write(x: Any) -> Any:
        tf.io.write_file(str(mark), "ran")
        return {"y": x + 1}

    source = save_function(tf, tmp_path / "saved", write, tf.TensorSpec((None,), tf.float32, name="x"))

    with pytest.raises(SourceError, match="reaches out of its graph") as caught:
        convert(str(source), tmp_path / "model.onnx")

    assert caught.value.found == "WriteFile"
    assert not mark.exists()


def test_graph_that_writes_a_file_is_refused_before_it_is_loaded(tf: Any, tmp_path: Path) -> None:
    """Loading runs what a SavedModel holds beside its signatures, such as initializers."""
    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": x + 1}, input_signature=[tf.TensorSpec((None,), tf.float32)])

    def write() -> Any:
        tf.io.write_file(str(tmp_path / "mark"), "ran")
        return tf.constant(0)

    module.other = tf.function(write, input_signature=[])
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=module.serve)

    with pytest.raises(SourceError, match="reaches out of its graph"):
        convert(str(tmp_path / "saved"), tmp_path / "model.onnx")


def test_operation_without_a_conversion_is_named(tf: Any, tmp_path: Path) -> None:
    source = save_function(
        tf,
        tmp_path / "saved",
        lambda x: {"y": tf.strings.to_hash_bucket_fast(x, 8)},
        tf.TensorSpec((None,), tf.string, name="x"),
    )

    with pytest.raises(SourceError, match="tf2onnx cannot convert") as caught:
        convert(str(source), tmp_path / "model.onnx")

    assert caught.value.found == "StringToHashBucketFast"


def test_unknown_rank_is_refused(tf: Any, tmp_path: Path) -> None:
    source = save_function(
        tf, tmp_path / "saved", lambda x: {"y": x + 1}, tf.TensorSpec(None, tf.float32, name="x")
    )

    with pytest.raises(SourceError, match="input 'x' has no rank"):
        convert(str(source), tmp_path / "model.onnx")


def test_damaged_folders_are_refused(polynomial: Path, tmp_path: Path) -> None:
    graph = polynomial / "saved_model.pb"
    whole = graph.read_bytes()
    for content, message in (
        (b"", "is empty"),
        (whole[: len(whole) // 2], "is it truncated"),
        (b"no protobuf at all", "is it truncated"),
    ):
        graph.write_bytes(content)
        with pytest.raises(SourceError, match=message):
            convert(str(polynomial), tmp_path / "model.onnx")
    graph.write_bytes(whole)
    shutil.rmtree(polynomial / "variables")
    with pytest.raises(SourceError, match="cannot be loaded as a SavedModel"):
        convert(str(polynomial), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
