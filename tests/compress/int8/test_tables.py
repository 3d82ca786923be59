"""Embedding tables by row, and weights that a file holds once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from digits_models import write_artifact
from quantize_models import build, cosine, tied_model
from tritonsmith.compress import steps
from tritonsmith.compress.int8.quantize import quantize_dynamic
from tritonsmith.compress.int8.tables import quantize_tables, share_weights
from tritonsmith.engines import open_session

TOKENS = np.arange(600).reshape(4, 150)


def lookup_model(table: np.ndarray) -> onnx.ModelProto:
    node = helper.make_node("Gather", ["table", "tokens"], ["rows"], "embed")
    return build(
        [node],
        {"table": table},
        inputs={"tokens": ["batch", "sequence"]},
        outputs={"rows": ["batch", "sequence", table.shape[1]]},
        integers=True,
    )


def test_each_row_has_a_scale_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(600, 24)) * 10.0 ** rng.uniform(-3, 3, (600, 1))).astype(np.float32)
    model = lookup_model(table)
    assert quantize_tables(model.graph, spared=frozenset()) == 1
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "rows.onnx"
    path.write_bytes(model.SerializeToString())

    found = open_session(path).run({"tokens": TOKENS})["rows"].reshape(600, 24)

    steps_of_rows = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - table) <= 0.501 * steps_of_rows).all()
    kinds = {tensor.data_type: list(tensor.dims) for tensor in model.graph.initializer}
    assert kinds == {TensorProto.INT8: [600, 24], TensorProto.FLOAT: [600, 1]}


def test_tables_that_are_kept_or_small_stay_floats() -> None:
    table = np.ones((600, 24), np.float32)
    assert quantize_tables(lookup_model(table).graph, spared=frozenset({"embed"})) == 0
    assert quantize_tables(lookup_model(table[:3]).graph, spared=frozenset()) == 0


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    artifact = write_artifact(tied_model(), tmp_path / "tied.onnx")
    spec = steps.Quantize(method="dynamic")
    quantized = quantize_dynamic(artifact, tmp_path / "model.onnx", spec=spec)

    graph = onnx.load(str(quantized.path)).graph
    sizes = [
        int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == TensorProto.INT8
    ]
    assert sorted(size for size in sizes if size >= 1024) == [32 * 32, 600 * 32]
    measured = quantized.steps[-1].measured
    assert measured["shared_bytes"] == 600 * 32
    assert (measured["int8_ops"], measured["ops"]) == (2, 2)
    assert quantized.path.stat().st_size < artifact.path.stat().st_size / 2.5
    expected, found = (
        open_session(model.path).run({"tokens": TOKENS})["scores"] for model in (artifact, quantized)
    )
    assert cosine(expected, found) > 0.999


def test_equal_weights_are_kept_once() -> None:
    array = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "b"], ["y"], "two"),
    ]
    shapes: dict[str, list[int | str]] = {"x": ["batch", 64]}
    model = build(nodes, {"a": array, "b": array}, inputs=shapes, outputs={"y": ["batch", 64]})
    assert share_weights(model.graph) == array.nbytes
    assert [tensor.name for tensor in model.graph.initializer] == ["a"]
    assert [node.input[1] for node in model.graph.node] == ["a", "a"]
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), array)
