"""Reading and writing ONNX files, small and large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_models import (
    embedding_model,
    identity_model,
    linear_model,
    linear_weights,
    model_from_text,
    write_model,
)
from tritonsmith import onnx_model
from tritonsmith.artifact import TensorSpec
from tritonsmith.errors import RepositoryError, SourceError
from tritonsmith.onnx_model import (
    check_file,
    copy_renamed,
    is_batched,
    is_large,
    load_editable,
    load_model,
    model_bytes,
    model_files,
    model_sha256,
    precision_of,
    save_model,
    signature_of,
)


@pytest.fixture
def low_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every model a large one, and every weight one that leaves the file."""
    monkeypatch.setattr(onnx_model, "EXTERNAL_DATA_THRESHOLD_BYTES", 1)
    monkeypatch.setattr(onnx_model, "EMBEDDED_BYTES", 1)


def run(path: Path, features: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"features": features})[0])


def linear_answer(features: np.ndarray) -> np.ndarray:
    weights = linear_weights()
    return np.asarray(features @ weights["weight"] + weights["bias"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 not a model", "cannot be read as ONNX"),
        (b"# Readme\n\nno model\n", "cannot be read as ONNX"),
        (b"\x08\x08", "cannot be read as ONNX"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=words) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = linear_model().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"model\.onnx cannot be read"):
        load_model(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no file"):
        load_model(tmp_path / "absent.onnx")


def test_weights_of_a_large_model_go_to_one_file_beside_it(tmp_path: Path, low_threshold: None) -> None:
    path = tmp_path / "model.onnx"
    save_model(linear_model(), path)
    assert [file.name for file in model_files(path)] == ["model.onnx", "model.onnx.data"]
    assert is_large(path)
    assert model_bytes(path) == sum(file.stat().st_size for file in tmp_path.iterdir())
    features = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(run(path, features), linear_answer(features), rtol=1e-6)


def test_a_large_model_is_read_without_its_weights_and_saved_with_them(
    tmp_path: Path, low_threshold: None
) -> None:
    first, second = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    first.parent.mkdir()
    second.parent.mkdir()
    save_model(linear_model(), first)
    model = load_editable(first)
    assert not any(tensor.raw_data for tensor in model.graph.initializer)
    save_model(model, second, weights_from=first.parent, data_name="weights")
    assert [file.name for file in model_files(second)] == ["model.onnx", "weights"]
    features = np.ones((3, 4), dtype=np.float32)
    np.testing.assert_allclose(run(second, features), linear_answer(features), rtol=1e-6)


def test_large_models_share_a_folder_under_other_names(tmp_path: Path, low_threshold: None) -> None:
    path = tmp_path / "model.onnx"
    save_model(linear_model(), path)
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ("gpu.fp16.onnx", "gpu.fp32.onnx"):
        copy = copy_renamed(path, beside / name)
        assert [file.name for file in model_files(copy)] == [name, f"{name}.data"]
        assert [file.read_bytes() for file in model_files(copy)[1:]] == [
            file.read_bytes() for file in model_files(path)[1:]
        ]
        np.testing.assert_allclose(
            run(copy, np.ones((1, 4), np.float32)), linear_answer(np.ones((1, 4))), 1e-6
        )


def test_weights_that_end_too_early_are_named(tmp_path: Path, low_threshold: None) -> None:
    path = tmp_path / "model.onnx"
    save_model(linear_model(), path)
    model = load_editable(path)
    (tmp_path / "model.onnx.data").write_bytes(b"1234")
    with pytest.raises(SourceError, match="ends inside of weight 'weight'"):
        save_model(model, tmp_path / "copy.onnx", weights_from=tmp_path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname"])
def test_weights_outside_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    model = linear_model()
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location, 0, 48)
    tensor.ClearField("raw_data")
    path = write_model(folder / "model.onnx", model)
    with pytest.raises(SourceError, match="outside of its folder") as caught:
        model_files(path)
    assert caught.value.found == location


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (folder / "weights").symlink_to(tmp_path / "secret.bin")
    model = linear_model()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights", 0, 48)
    model.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(SourceError, match="outside of its folder"):
        model_files(write_model(folder / "model.onnx", model))


def test_weights_in_a_missing_file_are_named(tmp_path: Path, low_threshold: None) -> None:
    path = tmp_path / "model.onnx"
    save_model(linear_model(), path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(SourceError, match="missing") as caught:
        model_files(path)
    assert caught.value.found == "model.onnx.data"


def test_the_hash_covers_the_weights(tmp_path: Path, low_threshold: None) -> None:
    path = tmp_path / "model.onnx"
    save_model(linear_model(), path)
    before = model_sha256(path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    assert model_sha256(path) != before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="cannot write"):
        save_model(linear_model(), tmp_path / "absent" / "model.onnx")


def test_a_graph_that_breaks_the_rules_is_refused(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.node[0].input[1] = "nowhere"
    with pytest.raises(SourceError, match="no valid ONNX model"):
        check_file(write_model(tmp_path / "model.onnx", model))


def test_the_signature_names_every_axis_and_leaves_out_what_a_weight_feeds() -> None:
    model = model_from_text(
        "g (float[batch, ?, 3] x, float[3] scale) => (float[batch, ?, 3] y) { y = Mul(x, scale) }",
        {"scale": np.ones(3, dtype=np.float32)},
    )
    inputs, outputs = signature_of(model)
    assert inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", "x_1", 3)),)
    assert outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", "y_1", 3)),)
    assert is_batched(inputs, outputs)


def test_a_scalar_has_an_empty_shape_and_no_batch_axis() -> None:
    inputs, outputs = signature_of(model_from_text("g (float x) => (float y) { y = Neg(x) }"))
    assert inputs[0].shape == outputs[0].shape == ()
    assert not is_batched(inputs, outputs)


def test_a_tensor_that_triton_cannot_serve_is_refused() -> None:
    with pytest.raises(SourceError, match="'x' has a data type") as caught:
        signature_of(identity_model("complex64"))
    assert caught.value.found == "COMPLEX64"
    sequence = onnx.helper.make_tensor_sequence_value_info("parts", onnx.TensorProto.FLOAT, None)
    model = linear_model()
    model.graph.output.append(sequence)
    with pytest.raises(SourceError, match="'parts' is a sequence_type"):
        signature_of(model)


def test_the_precision_is_read_off_the_weights() -> None:
    assert precision_of(linear_model()) == "fp32"
    assert precision_of(embedding_model()) == "fp32"
    half = {name: array.astype(np.float16) for name, array in linear_weights().items()}
    text = "g (float16[N, 4] x) => (float16[N, 3] y) { y = Gemm(x, weight, bias) }"
    assert precision_of(model_from_text(text, half)) == "fp16"
    quantized = model_from_text(
        "g (float[N, 4] x) => (float[N, 3] y) { w = DequantizeLinear(q, s)  y = MatMul(x, w) }",
        {"q": np.ones((4, 3), dtype=np.int8), "s": np.array(0.1, dtype=np.float32)},
    )
    assert precision_of(quantized) == "int8"
