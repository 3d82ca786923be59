"""ONNX sources: which first axis is a batch axis, every data type, and files that are no model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_models import (
    branching_model,
    embedding_model,
    linear_model,
    linear_weights,
    model_from_text,
    write_model,
)
from tritonsmith import onnx_model
from tritonsmith.dtypes import BY_NAME
from tritonsmith.engines import open_session
from tritonsmith.errors import SourceError
from tritonsmith.ingest import convert
from tritonsmith.ingest.onnx import export_onnx
from tritonsmith.ingest.source import ConvertOptions, Exported

# ONNX's text form of every data type that Triton has, by the name in dtypes.
TEXT_TYPES = {name: {"float32": "float", "float64": "double"}.get(name, name) for name in BY_NAME}


def read(folder: Path, model: onnx.ModelProto) -> Exported:
    return export_onnx(write_model(folder / "source.onnx", model), folder, ConvertOptions())


def shapes(exported: Exported) -> list[tuple[int | str, ...]]:
    return [spec.shape for spec in (*exported.inputs, *exported.outputs)]


def test_a_free_first_axis_becomes_the_batch_axis(tmp_path: Path) -> None:
    exported = read(tmp_path, linear_model("N"))
    assert exported.batched
    assert shapes(exported) == [("batch", 4), ("batch", 3)]
    features = np.ones((5, 4), np.float32)
    expected = features @ linear_weights()["weight"] + linear_weights()["bias"]
    np.testing.assert_allclose(exported.reference({"features": features})["scores"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ("float[N, 2] a, float[M, 2] b", "float[K, 2] y"),
        ("float[?, 2] a, float[?, 2] b", "float[?, 2] y"),
        ("float[N, 2] a, float[N, 2] b", "float[] y"),
    ],
)
def test_first_axes_of_any_name_that_go_together_are_the_batch_axis(
    tmp_path: Path, inputs: str, outputs: str
) -> None:
    exported = read(tmp_path, model_from_text(f"g ({inputs}) => ({outputs}) {{ y = Add(a, b) }}"))
    assert exported.batched
    assert shapes(exported) == [("batch", 2)] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g (float[1, 4] x) => (float[1, 4] y) { y = Neg(x) }", [(1, 4), (1, 4)]),
        (
            "g (float[N, 4] x) => (float[4] y) { y = ReduceSum <keepdims: int = 0> (x, axis) }",
            [("N", 4), (4,)],
        ),
        (
            "g (float[N, 4] x) => (float[N, N] y) { t = Transpose(x) y = MatMul(x, t) }",
            [("N", 4), ("N", "N")],
        ),
        ("g (float[N, N] x) => (float[N, N] y) { y = Neg(x) }", [("N", "N"), ("N", "N")]),
        ("g (float[N, 4] x, float s) => (float[N, 4] y) { y = Mul(x, s) }", [("N", 4), (), ("N", 4)]),
        ("g (float[batch, 4] x) => (float[batch, 4] y) { y = CumSum(x, zero) }", [("rows", 4), ("rows", 4)]),
        ("g (float x) => (float y) { y = Neg(x) }", [(), ()]),
        ("g () => (float[2] y) { y = Constant <value = float[2] {1.0, 2.0}> () }", [(2,)]),
    ],
    ids=["fixed", "summed", "gram", "square", "scalar beside", "rows mixed", "scalar", "no inputs"],
)
def test_other_first_axes_are_no_batch_axis(
    tmp_path: Path, text: str, expected: list[tuple[int | str, ...]]
) -> None:
    exported = read(tmp_path, model_from_text(text, {"axis": np.array([0]), "zero": np.array(0)}))
    assert not exported.batched
    assert shapes(exported) == expected


def test_an_output_without_a_rank_is_seen(tmp_path: Path) -> None:
    text = "g (float[n, 2] x, bool flag) => (float[] y) { y = Transpose(x) }"
    assert shapes(read(tmp_path, model_from_text(text)))[-1] == (2, "y_1")


@pytest.mark.parametrize("name", sorted(TEXT_TYPES))
@pytest.mark.parametrize("shape", ["N, 2", "N, 0", "", "3"], ids=["batched", "empty", "scalar", "fixed"])
def test_every_data_type_is_converted(tmp_path: Path, name: str, shape: str) -> None:
    kind = TEXT_TYPES[name] + (f"[{shape}]" if shape else "")
    model = model_from_text(f"g ({kind} x) => ({kind} y) {{ y = Identity(x) }}")
    source = write_model(tmp_path / "source.onnx", model)
    artifact = convert(str(source), tmp_path / "model.onnx")
    (spec,) = artifact.inputs
    assert spec.dtype == name
    assert artifact.batched == shape.startswith("N")
    values = np.arange(6).astype(BY_NAME[name].numpy)
    if name == "string":
        values = np.array([b"a", "Gr\u00fc\u00dfe".encode(), b"", b"b", b"c d", b"e"], dtype=object)
    sample = {
        "N, 2": values.reshape(3, 2),
        "N, 0": values[:0].reshape(3, 0),
        "": values[1:2].reshape(()),
        "3": values[:3],
    }
    fitted = sample[shape]
    answer = open_session(artifact.path).run({"x": fitted})["y"]
    assert answer.shape == fitted.shape
    assert answer.tolist() == fitted.tolist()


def test_indices_beyond_their_table_are_not_drawn(tmp_path: Path) -> None:
    artifact = convert(
        str(write_model(tmp_path / "source.onnx", embedding_model(rows=2))), tmp_path / "out.onnx"
    )
    assert artifact.inputs[0].shape == ("batch", "length")


def test_a_model_with_branches_and_a_scalar_is_converted(tmp_path: Path) -> None:
    artifact = convert(str(write_model(tmp_path / "source.onnx", branching_model())), tmp_path / "out.onnx")
    assert not artifact.batched
    session = open_session(artifact.path)
    x = np.array([3, 4], np.float32)
    assert session.run({"flag": np.array(True), "x": x})["y"].tolist() == [4, 5]
    assert session.run({"flag": np.array(False), "x": x})["y"].tolist() == [6, 8]


def test_weights_in_other_files_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(
        linear_model(), source, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bias", "source.onnx", "weight"]
    small = convert(str(source), tmp_path / "small" / "model.onnx")
    monkeypatch.setattr(onnx_model, "EXTERNAL_DATA_THRESHOLD_BYTES", 1)
    large = convert(str(source), tmp_path / "large" / "model.onnx")
    assert [file.name for file in small.path.parent.iterdir()] == ["model.onnx"]
    assert sorted(file.name for file in large.path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    features = {"features": np.ones((2, 4), np.float32)}
    expected = linear_weights()["weight"].sum(axis=0) + linear_weights()["bias"]
    for artifact in (small, large):
        answer = open_session(artifact.path).run(features)["scores"]
        np.testing.assert_allclose(answer, [expected, expected], rtol=1e-5)


def test_a_graph_that_onnx_runtime_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = made.Up(x) }"
    with pytest.raises(SourceError, match="ONNX Runtime cannot load") as caught:
        read(tmp_path, model_from_text(text, domains={"made": 1}))
    assert "Up" in str(caught.value.found)


def test_tensors_that_triton_cannot_serve_are_refused(tmp_path: Path) -> None:
    text = "g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }"
    with pytest.raises(SourceError, match="'y' is a sequence_type"):
        read(tmp_path, model_from_text(text))


def test_weights_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(48))
    model = linear_model()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secret", 0, 48)
    model.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(SourceError, match="outside of its folder"):
        convert(str(write_model(inside / "source.onnx", model)), tmp_path / "out.onnx")


def make_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a model")


def truncate(path: Path) -> None:
    path.write_bytes(linear_model().SerializeToString()[:60])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "an empty file"),
        (truncate, "cannot be read as ONNX"),
        (lambda path: path.write_text("# a text\n"), "a text file"),
        (make_zip, "a zip archive"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "an HDF5 file"),
        (lambda path: path.write_bytes(bytes(range(256))), "an unknown binary file"),
        (lambda path: path.write_bytes(b"\x08\x09" + bytes(range(200, 256))), "cannot be read as ONNX"),
    ],
    ids=["empty", "truncated", "text", "zip", "hdf5", "binary", "damaged"],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(tmp_path: Path, damage: object, words: str) -> None:
    source = tmp_path / "source.onnx"
    damage(source)  # type: ignore[operator]
    with pytest.raises(SourceError) as caught:
        convert(str(source), tmp_path / "out.onnx")
    assert words in str(caught.value)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()
