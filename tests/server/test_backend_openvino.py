"""The backend `openvino` in the real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from backend_models import (
    ask,
    ask_in_one_call,
    example,
    identity_config,
    identity_model,
    parameters,
    publish,
    stub_threads,
)
from onnx_models import model_from_text
from tritonsmith import dtypes
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.server.options import ServerOptions
from tritonsmith.server.process import Server, serve

NAMES = tuple(name for name in dtypes.BY_NAME if name != "string")
BACKEND = 'backend: "openvino"\n'
ONNX = 'default_model_filename: "model.onnx"\n'
ONE = "instance_group { count: 1 kind: KIND_CPU }\n"
INT32 = np.iinfo(np.int32)
WEIGHTS = np.random.default_rng(5).standard_normal((64, 4)).astype(np.float32)


def values(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """As `example`, within int32, in which OpenVINO computes the wide integers."""
    array = example(name, shape)
    if name not in ("int64", "uint64", "uint32"):
        return array
    return np.clip(array, 0 if array.dtype.kind == "u" else INT32.min, INT32.max)


def write_ir(repository: Path, name: str, *, layout: str | None) -> None:
    """y = x @ WEIGHTS as model.xml and model.bin, and no configuration at all."""
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    model = model_from_text(
        "product (float[batch, 64] x) => (float[batch, 4] y) { y = MatMul(x, w) }", {"w": WEIGHTS}
    )
    (folder / "source.onnx").write_bytes(model.SerializeToString())
    graph = openvino.Core().read_model(folder / "source.onnx")
    if layout is not None:
        for port in (*graph.inputs, *graph.outputs):
            port.node.layout = openvino.Layout(layout)
    openvino.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    (folder / "source.onnx").unlink()


def lay_out(repository: Path) -> None:
    batching = BACKEND + ONNX + ONE + "max_batch_size: 8\n"
    publish(
        repository, "types", identity_model(NAMES, "[batch, n]"), batching + identity_config(NAMES, "[ -1 ]")
    )
    publish(
        repository,
        "scalars",
        identity_model(NAMES, ""),
        BACKEND + ONNX + ONE + identity_config(NAMES, "[ 1 ]"),
    )
    publish(
        repository,
        "wide",
        identity_model(["int64", "float32"], "[batch]"),
        batching
        + "dynamic_batching { max_queue_delay_microseconds: 400000 }\n"
        + identity_config(["int64", "float32"], "[ 1 ] reshape { }"),
    )
    publish(
        repository,
        "tuned",
        model_from_text(
            "product (float[batch, 64] x) => (float[batch, 4] y) { y = MatMul(x, w) }", {"w": WEIGHTS}
        ),
        BACKEND
        + "max_batch_size: 8\ninstance_group { count: 2 kind: KIND_CPU }\n"
        + 'default_model_filename: "product.onnx"\n'
        + parameters(
            INFERENCE_NUM_THREADS=1,
            NUM_STREAMS=1,
            PERFORMANCE_HINT="latency",
            INFERENCE_PRECISION_HINT="f32",
            ENABLE_BATCH_PADDING="YES",
        ),
        file="product.onnx",
    )
    write_ir(repository, "bare", layout=None)
    write_ir(repository, "bare_layout", layout="NC")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, server_environment: ServerEnvironment
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("repository")
    lay_out(repository)
    good = tuple(sorted(path.name for path in repository.iterdir()))
    publish(repository, "text", identity_model(["string"], "[batch, n]"), BACKEND + ONNX + ONE)
    publish(repository, "unnamed", identity_model(["float32"], "[batch, n]"), BACKEND + ONE)
    options = ServerOptions(
        http_port=0, grpc_port=0, metrics_port=0, model_control="explicit", load_models=good
    )
    with serve(repository, options) as running:
        yield running


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def wire(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[ModuleType, Any]]:
    """A client module and a client of it."""
    module = request.param
    address = server.http_address if module is tritonclient.http else server.grpc_url
    with module.InferenceServerClient(address) as client:
        yield module, client


@pytest.fixture
def http(server: Server) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        yield client


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 5), (2, 0)])
def test_every_data_type_comes_back_as_it_was_sent(
    wire: tuple[ModuleType, Any], rows: int, columns: int
) -> None:
    inputs = {name: values(name, (rows, columns)) for name in NAMES}
    outputs = ask(*wire, "types", inputs)
    assert sorted(outputs) == sorted(f"{name}_out" for name in NAMES)
    for name, array in inputs.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"].astype(array.dtype), array, err_msg=name)


def test_a_scalar_of_every_data_type_comes_back(wire: tuple[ModuleType, Any]) -> None:
    inputs = {name: values(name, (2,))[1:] for name in NAMES}
    outputs = ask(*wire, "scalars", inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"].astype(array.dtype), array, err_msg=name)


def test_only_the_outputs_that_are_asked_for_come_back(wire: tuple[ModuleType, Any]) -> None:
    inputs = {name: values(name, (1, 2)) for name in NAMES}
    outputs = ask(*wire, "types", inputs, ["int8_out", "bfloat16_out"])
    assert sorted(outputs) == ["bfloat16_out", "int8_out"]
    np.testing.assert_array_equal(outputs["int8_out"], inputs["int8"])


def test_a_failing_request_in_a_batch_fails_alone(server: Server) -> None:
    """An integer that OpenVINO would wrap around is refused, and nothing but that request."""
    numbers = [5, 2**40, -7]
    requests = [
        {"int64": np.array([[number]]), "float32": np.array([[number]], np.float32)} for number in numbers
    ]
    good, refused, other = ask_in_one_call(server, "wide", requests)
    assert isinstance(refused, InferenceServerException)
    assert "must fit int32" in str(refused)
    for number, answer in ((5, good), (-7, other)):
        assert isinstance(answer, dict)
        assert answer["int64_out"].tolist() == [[number]]
        assert answer["float32_out"].tolist() == [[number]]


def test_requests_of_one_batch_get_back_each_its_own_rows(server: Server) -> None:
    rows = [np.array([[0], [1]]), np.array([[2]]), np.array([[3], [4], [0]])]
    requests = [{"int64": row, "float32": row.astype(np.float32) / 2} for row in rows]
    for row, answer in zip(rows, ask_in_one_call(server, "wide", requests), strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["int64_out"], row)
        np.testing.assert_array_equal(answer["float32_out"], row / 2)


def test_parameters_reach_the_engine(wire: tuple[ModuleType, Any], server: Server) -> None:
    x = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32)
    exact = x.astype(np.float64) @ WEIGHTS
    # bfloat16, OpenVINO's own choice on some machines, is off by about 0.05 here
    np.testing.assert_allclose(ask(*wire, "tuned", {"x": x})["y"], exact, atol=1e-4)
    first, second = stub_threads(server, "tuned")
    (default,) = stub_threads(server, "types")
    assert first == second <= default


@pytest.mark.parametrize(
    ("model", "max_batch_size", "dims"), [("bare", 0, [-1, 64]), ("bare_layout", 4, [64])]
)
def test_a_folder_without_configuration_is_completed_as_far_as_its_layout_says(
    http: tritonclient.http.InferenceServerClient, model: str, max_batch_size: int, dims: list[int]
) -> None:
    config = http.get_model_config(model)
    assert config["backend"] == "openvino"
    assert config["max_batch_size"] == max_batch_size
    assert config["input"][0]["dims"] == dims
    assert ("dynamic_batching" in config) == (max_batch_size > 1)
    metadata = http.get_model_metadata(model)
    assert metadata["platform"] == "openvino"
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]
    x = np.ones((2, 64), np.float32)
    y = ask(tritonclient.http, http, model, {"x": x})["y"]
    np.testing.assert_allclose(y, x @ WEIGHTS, atol=0.1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("text", "'string' string .*data type is not supported"),
        ("unnamed", r"model\.xml is missing; .*model\.onnx.*default_model_filename"),
    ],
)
def test_a_model_that_it_cannot_serve_is_refused_with_the_reason(
    http: tritonclient.http.InferenceServerClient, model: str, reason: str
) -> None:
    with pytest.raises(InferenceServerException, match=reason):
        http.load_model(model)


def test_a_parameter_with_an_unknown_value_is_refused(http: tritonclient.http.InferenceServerClient) -> None:
    wrong = {
        "backend": "openvino",
        "default_model_filename": "model.onnx",
        "parameters": {"PERFORMANCE_HINT": {"string_value": "FAST"}},
    }
    with pytest.raises(InferenceServerException, match="PERFORMANCE_HINT is 'FAST'; expected LATENCY"):
        http.load_model("unnamed", config=json.dumps(wrong))
