"""The backend `onnxruntime` in the real server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from backend_models import (
    ask,
    ask_in_one_call,
    example,
    execution_counts,
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

# ONNX Runtime's Python cannot take strings into a model that has bfloat16, so that has a model of its own
KINDS = {
    "types": tuple(name for name in dtypes.BY_NAME if name != "bfloat16"),
    "bfloats": ("bfloat16", "float32", "int64"),
}
BACKEND = 'backend: "onnxruntime"\n'
ONE = "instance_group { count: 1 kind: KIND_CPU }\n"
DELAYED = "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 400000 }\n"
TABLE = np.arange(10, dtype=np.float32).reshape(5, 2)


def lookup_model() -> onnx.ModelProto:
    """`row` is a row of TABLE, `negative` its negative; an index past the table fails the whole run."""
    return model_from_text(
        "lookup (int64[batch] index) => (float[batch, 2] row, float[batch, 2] negative) "
        "{ row = Gather <axis = 0> (table, index) negative = Neg(row) }",
        {"table": TABLE},
    )


def double_model(shape: str = "[batch, n]") -> onnx.ModelProto:
    return model_from_text(f"double (float{shape} x) => (float{shape} y) {{ y = Add(x, x) }}")


def running_sum_model() -> onnx.ModelProto:
    """The sum of a sequence so far, plus 100 where the sequence starts."""
    return model_from_text(
        "sums (float[batch, 1] x, float[batch, 1] start, float[batch, 1] before) "
        "=> (float[batch, 1] y, float[batch, 1] after) "
        "{ after = Add(before, x) bonus = Mul(start, hundred) y = Add(after, bonus) }",
        {"hundred": np.array(100, np.float32)},
    )


def default_model() -> onnx.ModelProto:
    """y = x + offset, where offset is 7 unless it is given."""
    return model_from_text(
        "defaulted (float[2] x, float[2] offset) => (float[2] y) { y = Add(x, offset) }",
        {"offset": np.full(2, 7, np.float32)},
    )


def port(kind: str, name: str, data_type: str, dims: str, more: str = "") -> str:
    return f'{kind} {{ name: "{name}" data_type: {data_type} dims: {dims} {more} }}\n'


def double_config(dims: str = "[ -1 ]") -> str:
    return port("input", "x", "TYPE_FP32", dims) + port("output", "y", "TYPE_FP32", dims)


def lay_out(repository: Path) -> None:
    for model, names in KINDS.items():
        config = BACKEND + ONE + "max_batch_size: 8\n" + identity_config(names, "[ -1 ]")
        publish(repository, model, identity_model(names, "[batch, n]"), config)
        config = BACKEND + ONE + identity_config(names, "[ 1 ]")
        publish(repository, f"scalar_{model}", identity_model(names, ""), config)
    publish(
        repository,
        "lookup",
        lookup_model(),
        BACKEND
        + ONE
        + DELAYED
        + port("input", "index", "TYPE_INT64", "[ 1 ]", "reshape { }")
        + port("output", "row", "TYPE_FP32", "[ 2 ]")
        + port("output", "negative", "TYPE_FP32", "[ 2, 1 ]", "reshape { shape: [ 2 ] }"),
    )
    config = "max_batch_size: 8\n" + parameters(intra_op_thread_count=1) + double_config()
    publish(repository, "single", double_model(), BACKEND + ONE + config)
    publish(
        repository,
        "threads",
        double_model(),
        BACKEND
        + "max_batch_size: 8\ninstance_group { count: 2 kind: KIND_CPU }\n"
        + 'default_model_filename: "other.onnx"\noptimization { graph { level: 2 } }\n'
        + parameters(intra_op_thread_count=5, execution_mode=0, enable_mem_arena=0)
        + double_config(),
        file="other.onnx",
    )
    publish(repository, "bare", double_model(), None)
    publish(repository, "bare_scalar", double_model(""), BACKEND + ONE)
    publish(repository, "bare_rows", double_model("[batch]"), BACKEND + ONE + "max_batch_size: 2\n")
    publish(
        repository,
        "defaulted",
        default_model(),
        BACKEND
        + ONE
        + double_config("[ 2 ]")
        + port("input", "offset", "TYPE_FP32", "[ 2 ]", "optional: true"),
    )
    publish(
        repository,
        "sums",
        running_sum_model(),
        BACKEND
        + "max_batch_size: 4\ninstance_group { count: 2 kind: KIND_CPU }\n"
        + double_config("[ 1 ]")
        + """
        sequence_batching {
          oldest { max_candidate_sequences: 8 }
          max_sequence_idle_microseconds: 20000000
          control_input { name: "start" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } }
          state {
            input_name: "before" output_name: "after" data_type: TYPE_FP32 dims: [ 1 ]
            initial_state { name: "zero" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true }
          }
        }
        """,
    )


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, server_environment: ServerEnvironment
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("repository")
    lay_out(repository)
    good = tuple(sorted(path.name for path in repository.iterdir()))
    publish(repository, "refused", double_model("[batch, 3]"), BACKEND + ONE)
    (repository / "empty" / "1").mkdir(parents=True)
    (repository / "empty" / "1" / "weights.bin").write_bytes(b"")
    (repository / "empty" / "config.pbtxt").write_text(BACKEND + ONE + double_config())
    publish(repository, "garbage", double_model(), BACKEND + ONE + double_config())
    (repository / "garbage" / "1" / "model.onnx").write_bytes(b"no model")
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


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 5), (2, 0)])
def test_every_data_type_comes_back_as_it_was_sent(
    wire: tuple[ModuleType, Any], model: str, rows: int, columns: int
) -> None:
    inputs = {name: example(name, (rows, columns)) for name in KINDS[model]}
    outputs = ask(*wire, model, inputs)
    assert sorted(outputs) == sorted(f"{name}_out" for name in inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"].astype(array.dtype), array, err_msg=name)


@pytest.mark.parametrize("model", KINDS)
def test_a_scalar_of_every_data_type_comes_back(wire: tuple[ModuleType, Any], model: str) -> None:
    inputs = {name: example(name, (2,))[1:] for name in KINDS[model]}
    outputs = ask(*wire, f"scalar_{model}", inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(outputs[f"{name}_out"].astype(array.dtype), array, err_msg=name)


def test_only_the_outputs_that_are_asked_for_come_back(wire: tuple[ModuleType, Any]) -> None:
    outputs = ask(*wire, "lookup", {"index": np.array([[4]])}, ["negative"])
    assert list(outputs) == ["negative"]
    np.testing.assert_array_equal(outputs["negative"], [[[-8], [-9]]])  # [N, 2] reshaped to [N, 2, 1]


def test_a_failing_request_in_a_batch_fails_alone(server: Server) -> None:
    indices = [0, 1, 99, 3]
    answers = ask_in_one_call(server, "lookup", [{"index": np.array([[index]])} for index in indices])
    for index, answer in zip(indices, answers, strict=True):
        if index == 99:
            assert isinstance(answer, InferenceServerException)
            assert "out of data bounds" in str(answer)
        else:
            assert isinstance(answer, dict)
            np.testing.assert_array_equal(answer["row"], TABLE[[index]])


def test_all_requests_of_a_batch_can_fail(server: Server) -> None:
    answers = ask_in_one_call(server, "lookup", [{"index": np.array([[index]])} for index in (98, 99)])
    for index, answer in zip((98, 99), answers, strict=True):
        assert isinstance(answer, InferenceServerException)
        assert f"idx={index}" in str(answer)


def test_requests_of_one_batch_get_back_each_its_own_rows(server: Server) -> None:
    rows = [np.array([[0], [1]]), np.array([[2]]), np.array([[3], [4], [0]])]
    answers = ask_in_one_call(server, "lookup", [{"index": index} for index in rows])
    for index, answer in zip(rows, answers, strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["row"], TABLE[index[:, 0]])


def test_a_request_that_is_cancelled_while_it_waits_is_not_computed(server: Server) -> None:
    before = execution_counts(server, "lookup")
    answered = Event()
    index = tritonclient.grpc.InferInput("index", [1, 1], "INT64")
    index.set_data_from_numpy(np.array([[0]]))
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        call = client.async_infer("lookup", [index], lambda result, error: answered.set())
        time.sleep(0.1)
        call.cancel()
        assert answered.wait(5)
        time.sleep(0.5)  # past the queue delay
    assert execution_counts(server, "lookup") == before


def test_instances_have_a_session_each_with_the_threads_that_are_asked_for(
    server: Server, wire: tuple[ModuleType, Any]
) -> None:
    x = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(ask(*wire, "threads", {"x": x})["y"], x * 2)
    (one,) = stub_threads(server, "single")
    first, second = stub_threads(server, "threads")
    assert first == second
    assert first - one == 5 - 1  # their intra_op_thread_count


def test_a_folder_without_configuration_is_completed(http: tritonclient.http.InferenceServerClient) -> None:
    config = http.get_model_config("bare")
    assert config["backend"] == "onnxruntime"
    assert config["platform"] == "onnxruntime_onnx"
    assert config["max_batch_size"] == 4
    assert "dynamic_batching" in config
    metadata = http.get_model_metadata("bare")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]


@pytest.mark.parametrize(
    ("model", "max_batch_size", "shape", "reshape"),
    [("bare_scalar", 0, [1], None), ("bare_rows", 2, [-1, 1], {"shape": []})],
)
def test_a_tensor_without_axes_of_its_own_is_completed_to_one_element(
    http: tritonclient.http.InferenceServerClient,
    model: str,
    max_batch_size: int,
    shape: list[int],
    reshape: object,
) -> None:
    config = http.get_model_config(model)
    assert config["max_batch_size"] == max_batch_size
    assert config["input"][0].get("reshape") == reshape
    assert http.get_model_metadata(model)["outputs"][0]["shape"] == shape
    x = np.full([abs(axis) for axis in shape], 3, np.float32)
    np.testing.assert_array_equal(ask(tritonclient.http, http, model, {"x": x})["y"], x * 2)


def test_an_optional_input_may_be_left_out(wire: tuple[ModuleType, Any]) -> None:
    x = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(ask(*wire, "defaulted", {"x": x})["y"], [8, 9])
    given = {"x": x, "offset": np.array([10, 20], np.float32)}
    np.testing.assert_array_equal(ask(*wire, "defaulted", given)["y"], [11, 22])


def test_sequences_keep_their_state_apart(server: Server) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        sums: dict[int, list[float]] = {7: [], 8: []}
        for step, values in enumerate([(1, 10), (2, 20), (3, 30)]):
            for sequence, value in zip(sums, values, strict=True):
                answer = ask(
                    tritonclient.grpc,
                    client,
                    "sums",
                    {"x": np.array([[value]], np.float32)},
                    sequence_id=sequence,
                    sequence_start=step == 0,
                    sequence_end=step == 2,
                )
                sums[sequence].append(float(answer["y"][0, 0]))
    assert sums == {7: [101, 3, 6], 8: [110, 30, 60]}


def test_a_missing_model_file_is_named(http: tritonclient.http.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match=r"model\.onnx is missing; .*weights\.bin"):
        http.load_model("empty")


def test_a_file_that_is_no_model_is_refused_in_the_words_of_the_engine(
    http: tritonclient.http.InferenceServerClient,
) -> None:
    with pytest.raises(
        InferenceServerException, match=r"ONNX Runtime .* cannot load .*Protobuf parsing failed"
    ):
        http.load_model("garbage")


def test_a_configuration_that_contradicts_the_model_is_refused(
    http: tritonclient.http.InferenceServerClient,
) -> None:
    wrong = {
        "backend": "onnxruntime",
        "max_batch_size": 4,
        "input": [{"name": "x", "data_type": "TYPE_FP16", "dims": [3]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [3]}],
    }
    with pytest.raises(
        InferenceServerException, match=r"config\.pbtxt says TYPE_FP16, the model says TYPE_FP32"
    ):
        http.load_model("refused", config=json.dumps(wrong))


def test_a_parameter_that_is_no_number_is_refused(http: tritonclient.http.InferenceServerClient) -> None:
    wrong = {
        "backend": "onnxruntime",
        "parameters": {"intra_op_thread_count": {"string_value": "many"}},
    }
    with pytest.raises(InferenceServerException, match="intra_op_thread_count is 'many'"):
        http.load_model("refused", config=json.dumps(wrong))
