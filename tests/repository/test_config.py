"""config.pbtxt from artifacts and [config] tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from publishing import artifact_of, tensor
from tritonsmith.dtypes import DATA_TYPES
from tritonsmith.errors import RecipeError, RepositoryError
from tritonsmith.repository.config import (
    check_config_table,
    config_from_artifact,
    config_from_text,
    inference_precision,
    specs_from_config,
    text_from_config,
)
from tritonsmith.repository.labels import labels_from_files
from tritonsmith.repository.warmup import raw_from_array

IMAGE = tensor("image", "float32", "batch", 8, 8, 1)
LABEL = tensor("label", "string", "batch")
SCORES = tensor("scores", "float16", "batch", "classes")
ARTIFACT = artifact_of([IMAGE], [LABEL, SCORES])

GOLDEN = """\
# Written by tritonsmith from the model and its recipe. Change those, not this file.
name: "digits"
backend: "onnxruntime"
max_batch_size: 16
input {
  name: "image"
  data_type: TYPE_FP32
  dims: [8, 8, 1]
}
output {
  name: "label"
  data_type: TYPE_STRING
  dims: [1]
  reshape {
  }
}
output {
  name: "scores"
  data_type: TYPE_FP16
  dims: [-1]
  label_filename: "labels.txt"
}
instance_group {
  count: 2
  kind: KIND_CPU
}
dynamic_batching {
  preferred_batch_size: [4, 8]
  max_queue_delay_microseconds: 500
}
parameters {
  key: "execution_mode"
  value {
    string_value: "0"
  }
}
parameters {
  key: "intra_op_thread_count"
  value {
    string_value: "1"
  }
}
"""


def configure(extra: Mapping[str, Any], **options: Any) -> model_config_pb2.ModelConfig:
    check_config_table(extra)
    return config_from_artifact(ARTIFACT, name="digits", backend="onnxruntime", extra=extra, **options)


def test_text_is_easy_to_read_and_always_the_same() -> None:
    parameters = {"intra_op_thread_count": 1, "execution_mode": "0"}
    batching = {"preferred_batch_size": [4, 8], "max_queue_delay_microseconds": 500}
    extra = {
        "parameters": parameters,
        "dynamic_batching": batching,
        "instance_group": [{"kind": "KIND_CPU", "count": 2}],
    }
    config = configure(extra, max_batch_size=16, labels={"scores": "labels.txt"})
    assert text_from_config(config) == GOLDEN
    assert config_from_text(GOLDEN) == config
    turned = {**extra, "parameters": dict(reversed(parameters.items()))}
    assert text_from_config(configure(turned, max_batch_size=16, labels={"scores": "labels.txt"})) == GOLDEN


def test_a_model_without_a_batch_axis() -> None:
    artifact = artifact_of([tensor("x", "int64")], [tensor("y", "bool", 3, "n")])
    text = text_from_config(config_from_artifact(artifact, name="m", backend="onnxruntime"))
    assert "max_batch_size: 0\n" in text
    config = config_from_text(text)
    assert list(config.input[0].dims) == [1]
    assert not config.input[0].HasField("reshape")
    assert list(config.output[0].dims) == [3, -1]


def test_max_batch_size_0_of_a_batched_model_keeps_the_axis() -> None:
    config = configure({}, max_batch_size=0)
    assert list(config.input[0].dims) == [-1, 8, 8, 1]
    assert list(config.output[0].dims) == [-1]


@pytest.mark.parametrize("data_type", DATA_TYPES, ids=lambda data_type: data_type.name)
def test_every_data_type(data_type: Any) -> None:
    spec = tensor("x", data_type.name, "batch", 2)
    config = config_from_artifact(artifact_of([spec], [spec]), name="m", backend="openvino")
    assert model_config_pb2.DataType.Name(config.input[0].data_type) == data_type.config
    assert specs_from_config(config) == ((spec,), (spec,), True)


@pytest.mark.parametrize(
    ("artifact", "size", "match"),
    [
        (artifact_of([tensor("x", "int8", 2)], [LABEL]), 4, "has no batch axis"),
        (ARTIFACT, -1, "negative"),
        (artifact_of([tensor("x", "int8", "batch", 0)], [LABEL]), None, "axis of length 0"),
    ],
)
def test_what_triton_cannot_describe(artifact: Any, size: int | None, match: str) -> None:
    with pytest.raises(RepositoryError, match=match):
        config_from_artifact(artifact, name="m", backend="onnxruntime", max_batch_size=size)


def test_every_kind_of_field() -> None:
    config = configure(
        {
            "dynamic_batching": {
                "priority_levels": 2,
                "default_priority_level": 2,
                "priority_queue_policy": {"1": {"timeout_action": "DELAY", "max_queue_size": 3}},
            },
            "optimization": {
                "execution_accelerators": {
                    "cpu_execution_accelerator": [{"name": "openvino", "parameters": {"precision": "FP32"}}]
                },
                "cuda": {"graphs": True},
            },
            "instance_group": [
                {
                    "kind": "KIND_GPU",
                    "rate_limiter": {"resources": [{"name": "r", "global": True, "count": 2}]},
                }
            ],
            "version_policy": {"specific": {"versions": [1, 3]}},
            "response_cache": {"enable": True},
            "metric_tags": {"team": "a"},
            "input": [{"name": "image", "format": "FORMAT_NHWC", "optional": True}],
        }
    )
    policy = config.dynamic_batching.priority_queue_policy[1]
    assert (policy.timeout_action, policy.max_queue_size) == (policy.DELAY, 3)
    accelerator = config.optimization.execution_accelerators.cpu_execution_accelerator[0]
    assert dict(accelerator.parameters) == {"precision": "FP32"}
    assert config.optimization.cuda.graphs
    assert getattr(config.instance_group[0].rate_limiter.resources[0], "global")
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert config.response_cache.enable
    assert config.metric_tags["team"] == "a"
    assert config.input[0].optional
    assert config.input[0].format == config.input[0].FORMAT_NHWC
    assert list(config.input[0].dims) == [8, 8, 1]


def test_an_empty_table_is_set() -> None:
    assert configure({"dynamic_batching": {}}).HasField("dynamic_batching")
    assert configure({"version_policy": {"all": {}}}).version_policy.WhichOneof("policy_choice") == "all"


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"dynamic_batchin": {}}, "config.dynamic_batchin ", "'dynamic_batching'"),
    (
        {"preferred_batch_size": [4]},
        "config.preferred_batch_size ",
        "config.dynamic_batching.preferred_batch_size",
    ),
    (
        {"dynamic_batching": {"prefered_batch_size": [4]}},
        "dynamic_batching.prefered",
        "'preferred_batch_size'",
    ),
    (
        {"dynamic_batching": {"preferred_batch_size": 4}},
        "dynamic_batching.preferred_batch_size ",
        "the integer 4",
    ),
    ({"dynamic_batching": {"preferred_batch_size": ["4"]}}, "preferred_batch_size[0]", "the string '4'"),
    ({"dynamic_batching": {"preferred_batch_size": [True]}}, "preferred_batch_size[0]", "the boolean true"),
    ({"dynamic_batching": {"preferred_batch_size": [4.5]}}, "preferred_batch_size[0]", "the number 4.5"),
    ({"dynamic_batching": {"preferred_batch_size": [2**31]}}, "preferred_batch_size[0]", "2147483647"),
    ({"dynamic_batching": {"priority_levels": -1}}, "dynamic_batching.priority_levels", "0 to"),
    ({"dynamic_batching": 3}, "config.dynamic_batching", "a table"),
    ({"instance_group": {"count": 1}}, "config.instance_group", "an array"),
    ({"instance_group": [{"kind": "CPU"}]}, "config.instance_group[0].kind", "KIND_CPU?"),
    ({"instance_group": [{"kind": 1}]}, "config.instance_group[0].kind", "KIND_GPU"),
    ({"instance_group": [{"cuont": 1}]}, "config.instance_group[0].cuont", "'count'"),
    ({"response_cache": {"enable": "yes"}}, "config.response_cache.enable", "true or false"),
    ({"parameters": {"threads": True}}, "config.parameters.threads", "a string or a number"),
    ({"version_policy": {"all": {}, "latest": {"num_versions": 1}}}, "version_policy.latest", "keep one"),
    ({"dynamic_batching": {}, "sequence_batching": {}}, "config.sequence_batching", "keep one"),
    ({"dynamic_batching": {"priority_queue_policy": {"a": {}}}}, "priority_queue_policy.a", "an integer"),
    ({"name": "x"}, "config.name", "[model] name"),
    ({"max_batch_size": 4}, "config.max_batch_size", "[model] max_batch_size"),
    ({"ensemble_scheduling": {}}, "config.ensemble_scheduling", "[[ensemble]]"),
    ({"input": [{"name": "imag"}]}, "config.input[0]", "'image'"),
    ({"input": [{"name": "image", "dims": [3]}]}, "config.input[0].dims", "derived"),
    ({"output": [{"name": "scores", "x": 1}]}, "config.output[0].x", "fields here"),
    ({"dynamic_batching": {"preferred_batch_size": [9]}}, "preferred_batch_size", "1 to 8"),
]


@pytest.mark.parametrize(("extra", "place", "hint"), MISTAKES)
def test_a_mistake_is_named_by_key_and_place(extra: dict[str, Any], place: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        configure(extra)
    assert place in error.value.what
    assert hint in str(error.value)


def test_dynamic_batching_of_a_model_that_cannot_batch() -> None:
    """Triton loads it and never batches; nobody who writes it means that."""
    with pytest.raises(RecipeError, match="does nothing"):
        configure({"dynamic_batching": {}}, max_batch_size=0)


def test_a_damaged_config_names_line_and_file() -> None:
    with pytest.raises(RepositoryError) as error:
        config_from_text('name: "a"\nmax_batch_sise: 3\n', place="m/config.pbtxt")
    assert "m/config.pbtxt" in error.value.what
    assert "2:1" in str(error.value)


@pytest.mark.parametrize(
    ("array", "dtype", "raw"),
    [
        (np.array([1, -2], np.int16), "int16", b"\x01\x00\xfe\xff"),
        (np.float32(1), "float32", b"\x00\x00\x80\x3f"),
        (np.array([True, False]), "bool", b"\x01\x00"),
        (np.array([b"ab", b""], object), "string", b"\x02\x00\x00\x00ab\x00\x00\x00\x00"),
        (b"abc", "string", b"\x03\x00\x00\x00abc"),
    ],
)
def test_raw_tensors(array: Any, dtype: str, raw: bytes) -> None:
    assert raw_from_array(array, dtype) == raw


def test_labels_fit_their_output(tmp_path: Path) -> None:
    outputs = (tensor("p", "float32", "batch", 2), tensor("free", "float32", "batch", "n"))
    two, three = tmp_path / "two.txt", tmp_path / "three.txt"
    two.write_text("cat\ndog\n")
    three.write_text("a\nb\nc\n")
    labels = labels_from_files({"p": two, "free": three}, outputs)
    assert labels.names == {"p": "two.txt", "free": "three.txt"}
    assert labels.files == {"two.txt": two, "three.txt": three}
    with pytest.raises(RecipeError, match="does not fit") as error:
        labels_from_files({"p": three}, outputs)
    assert (error.value.found, error.value.expected) == ("3 lines", "2 lines, one for each value")
    with pytest.raises(RecipeError, match="no such output"):
        labels_from_files({"q": two}, outputs)
    with pytest.raises(RecipeError, match="cannot be read"):
        labels_from_files({"p": tmp_path / "absent.txt"}, outputs)


@pytest.mark.parametrize(
    ("backend", "size", "padded"),
    [("openvino", 4, True), ("openvino", 1, False), ("onnxruntime", 4, False)],
)
def test_openvino_may_batch_less_than_its_largest_batch(backend: str, size: int, padded: bool) -> None:
    config = config_from_artifact(ARTIFACT, name="m", backend=backend, max_batch_size=size)
    assert ("ENABLE_BATCH_PADDING" in config.parameters) is padded


def test_a_recipe_can_turn_batch_padding_off() -> None:
    extra = {"parameters": {"ENABLE_BATCH_PADDING": "NO"}}
    config = config_from_artifact(ARTIFACT, name="m", backend="openvino", max_batch_size=4, extra=extra)
    assert config.parameters["ENABLE_BATCH_PADDING"].string_value == "NO"


def test_openvino_serves_the_precision_that_the_file_has() -> None:
    config = config_from_artifact(ARTIFACT, name="m", backend="openvino")
    assert config.parameters["INFERENCE_PRECISION_HINT"].string_value == "F32"
    assert inference_precision({"INFERENCE_PRECISION_HINT": "F32"}) == "f32"
    assert inference_precision({"INFERENCE_PRECISION_HINT": "F32", "HINT_BF16": "yes"}) == "bf16"
    assert inference_precision({}) is None


@pytest.mark.parametrize(
    ("size", "extra", "scheduler"),
    [
        (4, {}, "dynamic_batching"),
        (1, {}, None),
        (4, {"sequence_batching": {}}, "sequence_batching"),
    ],
)
def test_a_model_that_can_batch_gets_a_batcher(
    size: int, extra: dict[str, Any], scheduler: str | None
) -> None:
    config = config_from_artifact(ARTIFACT, name="m", backend="onnxruntime", max_batch_size=size, extra=extra)
    assert config.WhichOneof("scheduling_choice") == scheduler


SEQUENCE = artifact_of(
    [
        tensor("x", "float32", "batch", 1),
        tensor("START", "float32", "batch", 1),
        tensor("old", "int64", "batch", 1),
    ],
    [tensor("y", "float32", "batch", 1), tensor("new", "int64", "batch", 1)],
)
START = {"name": "START", "control": [{"kind": "CONTROL_SEQUENCE_START", "fp32_false_true": [0, 1]}]}
STATE = {"input_name": "old", "output_name": "new", "data_type": "TYPE_INT64", "dims": [1]}


def test_clients_do_not_see_what_triton_fills_in_a_sequence() -> None:
    extra = {"sequence_batching": {"control_input": [START], "state": [STATE], "direct": {}}}
    config = config_from_artifact(SEQUENCE, name="m", backend="onnxruntime", extra=extra)
    assert [entry.name for entry in config.input] == ["x"]
    assert [entry.name for entry in config.output] == ["y"]


@pytest.mark.parametrize(
    "sequence",
    [{"control_input": [{**START, "name": "BEGIN"}]}, {"state": [{**STATE, "input_name": "x_old"}]}],
)
def test_a_sequence_tensor_that_the_model_lacks(sequence: dict[str, Any]) -> None:
    extra = {"sequence_batching": sequence}
    with pytest.raises(RecipeError, match=r"sequence_batching\.(control_input|state) names"):
        config_from_artifact(SEQUENCE, name="m", backend="onnxruntime", extra=extra)
