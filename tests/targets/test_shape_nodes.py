"""Shape with a range of axes, which TensorRT 8.6 reads as a whole Shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_models import model_from_text, write_model
from tritonsmith.engines import open_session
from tritonsmith.targets.shape_nodes import copy_with_whole_shapes


@pytest.mark.parametrize(
    ("ends", "expected"),
    [("start = 1", [3, 4]), ("start = 1, end = 2", [3]), ("end = -1", [2, 3]), ("start = -2", [3, 4])],
)
def test_a_range_of_axes_becomes_a_slice_with_the_same_answer(
    tmp_path: Path, ends: str, expected: list[int]
) -> None:
    model = model_from_text(f"ranged (float[a, b, c] x) => (int64[n] y) {{ y = Shape <{ends}> (x) }}")
    source = write_model(tmp_path / "model.onnx", model)
    path = copy_with_whole_shapes(source, tmp_path / "copy.onnx")
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Shape" and node.attribute]
    onnx.checker.check_model(path, full_check=True)
    found = open_session(path).run({"x": np.zeros((2, 3, 4), np.float32)})["y"]
    assert found.tolist() == expected


def test_a_model_without_such_nodes_stays_as_it_is(tmp_path: Path) -> None:
    model = model_from_text("whole (float[a, b] x) => (int64[2] y) { y = Shape(x) }")
    source = write_model(tmp_path / "model.onnx", model)
    copy = copy_with_whole_shapes(source, tmp_path / "copy.onnx")
    assert copy.read_bytes() == source.read_bytes()


def test_external_data_goes_along(tmp_path: Path) -> None:
    text = (
        "external (float[a, 3] x) => (float[a, 3] y, int64[1] n) { y = Add(x, one) n = Shape <end = 1> (x) }"
    )
    model = model_from_text(text, {"one": np.arange(3, dtype=np.float32)})
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "copies").mkdir()
    copy = copy_with_whole_shapes(source, tmp_path / "copies" / "gpu.fp32.onnx")
    (tmp_path / "weights.bin").unlink()
    found = open_session(copy).run({"x": np.ones((2, 3), np.float32)})
    assert found["y"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert found["n"].tolist() == [2]
