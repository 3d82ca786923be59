"""Both engines in process: every data type, the engine's own reasons, and what each cannot do."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

from onnx_models import model_from_text, write_model
from tritonsmith import dtypes
from tritonsmith.engines import open_session
from tritonsmith.errors import EngineError, UsageError

ENGINES = ("onnxruntime", "openvino")
ONNX_NAMES = {"float32": "float", "float64": "double"}  # where ONNX's text form has its own


def write_identity(folder: Path, kind: str, shape: str) -> Path:
    model = model_from_text(f"same ({kind}{shape} x) => ({kind}{shape} y) {{ y = Identity(x) }}")
    return write_model(folder / "model.onnx", model)


def write_affine(folder: Path) -> Path:
    """y = 2 x + 1 and its negative, for rows of three."""
    model = model_from_text(
        "affine (float[batch, 3] x) => (float[batch, 3] y, float[batch, 3] minus) "
        "{ twice = Add(x, x) y = Add(twice, one) minus = Neg(y) }",
        {"one": np.ones(1, np.float32)},
    )
    return write_model(folder / "affine.onnx", model)


def some_values(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if name == "string":
        words = np.resize(np.array(["Zürich".encode(), b"", b"a\0b"], object), shape)
        return np.array(words, object).reshape(shape)
    return np.resize(np.array([1, 0, 3]), shape).astype(dtypes.BY_NAME[name].numpy)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", dtypes.BY_NAME)
@pytest.mark.parametrize(("axes", "shape"), [("[batch, n]", (2, 3)), ("[batch, n]", (0, 3)), ("", ())])
def test_every_data_type_and_rank_is_computed(
    tmp_path: Path, engine: str, name: str, axes: str, shape: tuple[int, ...]
) -> None:
    path = write_identity(tmp_path, ONNX_NAMES.get(name, name), axes)
    if (engine, name) == ("openvino", "string"):
        with pytest.raises(EngineError, match="'x' is string"):
            open_session(path, engine=engine)
        return
    x = some_values(name, shape)
    y = open_session(path, engine=engine).run({"x": x})["y"]
    assert y.dtype == x.dtype
    assert y.shape == shape
    assert y.tolist() == x.tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_have_their_names_and_outlive_the_next_run(tmp_path: Path, engine: str) -> None:
    session = open_session(write_affine(tmp_path), engine=engine, threads=1)
    first = session.run({"x": np.zeros((1, 3), np.float32)})
    session.run({"x": np.full((1, 3), 5, np.float32)})
    assert list(first) == ["y", "minus"]
    np.testing.assert_array_equal(first["y"], [[1, 1, 1]])
    np.testing.assert_array_equal(first["minus"], [[-1, -1, -1]])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({}, id="missing"),
        pytest.param({"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)}, id="extra"),
        pytest.param({"x": np.zeros((1, 4), np.float32)}, id="length"),
        pytest.param({"x": np.zeros(3, np.float32)}, id="rank"),
        pytest.param({"x": np.zeros((1, 3), np.float64)}, id="data type"),
    ],
)
def test_inputs_that_do_not_fit_are_an_engine_error_about_the_file(
    tmp_path: Path, engine: str, inputs: Mapping[str, NDArray[Any]]
) -> None:
    session = open_session(write_affine(tmp_path), engine=engine)
    with pytest.raises(EngineError, match=r"affine\.onnx") as caught:
        session.run(inputs)
    assert caught.value.found is not None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_a_file_that_is_no_model_is_an_engine_error(
    tmp_path: Path, engine: str, content: bytes | None
) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=r"cannot load .*broken\.onnx"):
        open_session(path, engine=engine)


def test_the_reason_is_the_engine_s_own(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(EngineError) as caught:
        open_session(path)
    assert "Protobuf parsing failed" in str(caught.value.found)


def test_onnxruntime_refuses_strings_that_are_not_utf8(tmp_path: Path) -> None:
    session = open_session(write_identity(tmp_path, "string", "[batch]"))
    with pytest.raises(EngineError, match="cannot read input 'x'"):
        session.run({"x": np.array([b"\xff"], object)})


def test_openvino_reads_its_own_format(tmp_path: Path) -> None:
    graph = openvino.Core().read_model(write_affine(tmp_path))
    openvino.save_model(graph, tmp_path / "affine.xml")
    outputs = open_session(tmp_path / "affine.xml", engine="openvino").run({"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((2, 3), 3))


def test_openvino_computes_in_float32_whatever_the_machine_prefers(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((256, 8)).astype(np.float32)
    x = random.standard_normal((4, 256)).astype(np.float32)
    model = model_from_text(
        "product (float[batch, 256] x) => (float[batch, 8] y) { y = MatMul(x, w) }", {"w": weights}
    )
    path = write_model(tmp_path / "model.onnx", model)
    y = open_session(path, engine="openvino").run({"x": x})["y"]
    np.testing.assert_allclose(y, x.astype(np.float64) @ weights, atol=1e-4)  # bfloat16: about 0.1


@pytest.mark.parametrize("name", ["int64", "uint64", "uint32"])
def test_openvino_refuses_integers_that_it_would_wrap_around(tmp_path: Path, name: str) -> None:
    session = open_session(write_identity(tmp_path, name, "[batch]"), engine="openvino")
    with pytest.raises(EngineError, match="cannot take input 'x'") as caught:
        session.run({"x": np.array([2**31]).astype(name)})
    assert "2147483648" in str(caught.value.found)


def test_an_engine_that_is_not_installed_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.modules['openvino'] = None\n"
        "from tritonsmith.engines import open_session\n"
        "from tritonsmith.errors import MissingExtraError\n"
        "try:\n    open_session(pathlib.Path('model.onnx'), engine='openvino')\n"
        "except MissingExtraError as error:\n    print(error.fix)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "pip install 'tritonsmith[openvino]'"


def test_an_unknown_engine_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine is named 'tensorflow'"):
        open_session(tmp_path / "model.onnx", engine="tensorflow")


def test_onnxruntime_reports_nothing_to_its_maker() -> None:
    """Its telemetry keeps a thread of its own from its import on; a CI variable turns it off, too."""
    quiet = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    variables = {key: value for key, value in os.environ.items() if key not in quiet}
    code = "import {} onnxruntime, os; print(len(os.listdir('/proc/self/task')))"
    reporting, silent = (
        int(subprocess.check_output([sys.executable, "-c", code.format(first)], env=variables))
        for first in ("", "tritonsmith,")
    )
    version = tuple(map(int, importlib.metadata.version("onnxruntime").split(".")[:2]))
    if version < (1, 29):
        pytest.skip("this ONNX Runtime is older than its telemetry")
    assert silent < reporting
