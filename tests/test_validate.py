"""Validation on the real server, of models that serve what they should and of some that do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_models import identity_model, linear_model, linear_weights, model_from_text, write_model
from tritonsmith.artifact import Manifest, Step
from tritonsmith.build import build
from tritonsmith.client import Client
from tritonsmith.errors import RepositoryError, SamplesError, UsageError, ValidationError
from tritonsmith.manifest import text_from_manifest
from tritonsmith.recipe import BuildRequest
from tritonsmith.server.options import ServerOptions
from tritonsmith.server.process import serve
from tritonsmith.validate import Check, ValidationReport, validate
from tritonsmith.validate.compare import compare

LINEAR = """
input [{ name: "features" data_type: TYPE_FP32 dims: [4] }]
output [{ name: "scores" data_type: TYPE_FP32 dims: [3] }]
"""
MERGING = "dynamic_batching { max_queue_delay_microseconds: 10000 }\n"

# The second step of an ensemble: it adds how often it was called, so no two answers agree.
COUNTER = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    calls = 0

    def execute(self, requests):
        return [self.answer(pb.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def answer(self, x):
        self.calls += 1
        return pb.InferenceResponse([pb.Tensor("y", (x + self.calls).astype(np.float32))])
"""
ARGMAX = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def answer(self, x):
        labels = np.array([["class %d" % row.argmax()] for row in x], dtype=object)
        return pb.InferenceResponse([pb.Tensor("label", labels)])
"""


def ensemble(last: str, output: str, data_type: str, dims: int) -> str:
    return f"""
platform: "ensemble"
max_batch_size: 4
input [{{ name: "features" data_type: TYPE_FP32 dims: [4] }}]
output [{{ name: "{output}" data_type: {data_type} dims: [{dims}] }}]
ensemble_scheduling {{ step [
  {{ model_name: "{last}" model_version: -1
     input_map {{ key: "x" value: "between" }} output_map {{ key: "{output}" value: "{output}" }} }},
  {{ model_name: "linear" model_version: -1
     input_map {{ key: "features" value: "features" }} output_map {{ key: "scores" value: "between" }} }}
] }}
"""


def shifted_model(shift: float) -> onnx.ModelProto:
    weights = linear_weights()
    return model_from_text(
        "linear (float[N, 4] features) => (float[N, 3] scores) "
        "{ product = MatMul(features, weight)  scores = Add(product, bias) }",
        {**weights, "bias": weights["bias"] + np.array([0, shift, 0], np.float32)},
    )


def write_entry(repository: Path, name: str, config: str, model: onnx.ModelProto | None = None) -> Path:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    backend = 'backend: "onnxruntime"\n' if model is not None else ""
    (folder.parent / "config.pbtxt").write_text(backend + config)
    if model is not None:
        write_model(folder / "model.onnx", model)
    return folder


def write_python(repository: Path, name: str, output: str, code: str) -> None:
    folder = write_entry(
        repository,
        name,
        'backend: "python"\nmax_batch_size: 4\ninput [{ name: "x" data_type: TYPE_FP32 dims: [3] }]\n'
        + output,
    )
    (folder / "model.py").write_text(code)


@dataclass(frozen=True)
class Served:
    repository: Path
    http: str
    grpc: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("validate") / "repository"
    write_entry(repository, "linear", "max_batch_size: 4\n" + MERGING + LINEAR, linear_model())
    write_entry(repository, "alone", "max_batch_size: 4\n" + LINEAR, linear_model())
    write_entry(repository, "shifted", "max_batch_size: 4\n" + LINEAR, shifted_model(0.01))
    reduced = write_entry(repository, "reduced", "max_batch_size: 4\n" + LINEAR, shifted_model(0.01))
    reduced.joinpath("manifest.json").write_text(text_from_manifest(manifest("reduced", "int8", 0.0)))
    pruned = write_entry(repository, "pruned", "max_batch_size: 4\n" + LINEAR, shifted_model(0.01))
    lineage = replace(manifest("pruned", "fp32", 0.0), steps=(STEP, replace(STEP, name="prune")))
    pruned.joinpath("manifest.json").write_text(text_from_manifest(lineage))
    write_entry(
        repository,
        "unbatched",
        'max_batch_size: 0\ninput [{ name: "x" data_type: TYPE_STRING dims: [-1, 2] }]\n'
        'output [{ name: "y" data_type: TYPE_STRING dims: [-1, 2] }]',
        identity_model("string", "n, 2"),
    )
    write_entry(
        repository,
        "half",
        'max_batch_size: 4\ninput [{ name: "x" data_type: TYPE_BF16 dims: [2] }]\n'
        'output [{ name: "y" data_type: TYPE_BF16 dims: [2] }]',
        identity_model("bfloat16"),
    )
    write_entry(
        repository,
        "flat",
        'max_batch_size: 4\ninput [{ name: "x" data_type: TYPE_INT64 dims: [1] reshape { shape: [] } }]\n'
        'output [{ name: "y" data_type: TYPE_INT64 dims: [1] reshape { shape: [] } }]',
        identity_model("int64", "N"),
    )
    write_python(repository, "counter", 'output [{ name: "y" data_type: TYPE_FP32 dims: [3] }]', COUNTER)
    write_python(repository, "label", 'output [{ name: "label" data_type: TYPE_STRING dims: [1] }]', ARGMAX)
    write_entry(repository, "labelled", ensemble("label", "label", "TYPE_STRING", 1))
    write_entry(repository, "unsteady", ensemble("counter", "y", "TYPE_FP32", 3))
    with serve(repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield Served(repository=repository, http=server.http_url, grpc=server.grpc_url)


STEP = Step(
    name="convert",
    options={},
    input_sha256="",
    output_sha256="",
    tools={},
    duration_s=0.0,
    bytes_before=1,
    bytes_after=1,
)


def manifest(name: str, precision: str, max_drop: float) -> Manifest:
    return Manifest(
        name=name,
        version=1,
        fingerprint="",
        source="model.onnx",
        source_sha256="",
        inputs=(),
        outputs=(),
        batched=True,
        precision=precision,
        backend="onnxruntime",
        files={},
        steps=(),
        gate={"metric": "accuracy", "max_drop": max_drop},
        candidates=(),
        model_files={},
    )


@pytest.fixture(scope="module")
def features() -> Any:
    return np.random.default_rng(5).normal(size=(12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def scores(features: Any) -> Any:
    weights = linear_weights()
    return features @ weights["weight"] + weights["bias"]


@pytest.fixture
def samples(tmp_path: Path, features: Any) -> Path:
    return write_samples(tmp_path, features=features)


def write_samples(folder: Path, **arrays: Any) -> Path:
    path = folder / "samples.npz"
    np.savez(path, **arrays)
    return path


def check(served: Served, name: str, samples: Path, **options: Any) -> ValidationReport:
    return validate(served.repository, name, samples, http_url=served.http, grpc_url=served.grpc, **options)


def test_a_faithful_model_passes_every_check(served: Served, samples: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.onnx", linear_model())
    report = check(served, "linear", samples, against=str(source))
    assert report.passed
    assert {(item.protocol, item.mode, item.against) for item in report.checks} == {
        (protocol, mode, against)
        for protocol in ("http", "grpc")
        for mode in ("single", "batched", "concurrent")
        for against in ("source", "file")
    }
    for item in report.checks:
        assert item.passed
        assert (item.output, item.samples_count, item.values_count) == ("scores", 12, 36)
        assert item.tolerance == 1e-4
    assert report.metric is None
    assert report.notes == ()


def test_the_statistics_show_whether_requests_were_mixed(served: Served, samples: Path) -> None:
    merged, alone = check(served, "linear", samples), check(served, "alone", samples)
    for item in merged.mixing:
        assert item.mixed
        assert item.samples_count >= 12
        assert item.executions_count < item.samples_count
        assert 2 <= item.largest_batch <= 4
    for item in alone.mixing:
        assert not item.mixed
        assert item.executions_count == item.samples_count == 36  # three rounds of 12
    assert [item.protocol for item in merged.mixing] == ["http", "grpc"]
    assert alone.passed
    assert len([note for note in alone.notes if "nothing was mixed" in note]) == 2


def test_a_model_that_is_not_its_source_fails_and_says_where(
    served: Served, samples: Path, tmp_path: Path, features: Any, scores: Any
) -> None:
    source = write_model(tmp_path / "source.onnx", linear_model())
    report = check(served, "shifted", samples, against=str(source))
    assert not report.passed
    by_reference = {item.against: item for item in report.checks if item.mode == "batched"}
    assert by_reference["file"].passed
    wrong = by_reference["source"]
    assert not wrong.passed
    assert wrong.max_abs_error == pytest.approx(0.01, rel=1e-3)
    assert wrong.worst is not None
    assert wrong.worst.place == (1,)  # the column that was shifted
    expected = float(scores[wrong.worst.sample, 1])
    assert float(wrong.worst.expected) == pytest.approx(expected, abs=1e-5)
    assert float(wrong.worst.served) == pytest.approx(expected + 0.01, abs=1e-5)


def test_another_file_than_the_one_that_is_served_fails(
    served: Served, samples: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(served.repository, copy)
    write_model(copy / "linear" / "1" / "model.onnx", shifted_model(1.0))
    report = validate(copy, "linear", samples, http_url=served.http, grpc_url=served.grpc)
    assert not report.passed
    assert not any(item.passed for item in report.checks)


def test_reduced_precision_is_judged_by_its_gate(
    served: Served, tmp_path: Path, features: Any, scores: Any
) -> None:
    source = str(write_model(tmp_path / "source.onnx", linear_model()))
    samples = write_samples(tmp_path, features=features, target=scores.argmax(axis=1))
    report = check(served, "reduced", samples, against=source)
    assert report.passed
    for item in report.checks:
        assert item.tolerance == (None if item.against == "source" else 5e-2)
    assert report.metric is not None
    assert (report.metric.metric, report.metric.max_drop) == ("accuracy", 0.0)
    assert report.metric.baseline == 1.0
    # A shift of 0.01 moves no sample's best class here, which is what the labels were made from.
    assert report.metric.candidate == 1.0
    wrong = (scores.argmax(axis=1) + 1) % 3
    report = check(
        served, "reduced", write_samples(tmp_path, features=features, target=wrong), against=source
    )
    assert report.metric is not None
    assert report.metric.candidate == 0.0


def test_a_compressed_fp32_model_is_judged_by_its_gate_and_equal_to_its_file(
    served: Served, tmp_path: Path, features: Any, scores: Any
) -> None:
    source = str(write_model(tmp_path / "source.onnx", linear_model()))
    samples = write_samples(tmp_path, features=features, target=scores.argmax(axis=1))
    report = check(served, "pruned", samples, against=source)
    assert report.passed
    for item in report.checks:
        assert item.tolerance == (None if item.against == "source" else 1e-4)
    assert report.metric is not None
    assert report.metric.max_drop == 0.0


def test_reduced_precision_without_a_budget_is_noted(served: Served, samples: Path, tmp_path: Path) -> None:
    source = str(write_model(tmp_path / "source.onnx", linear_model()))
    report = check(served, "reduced", samples, against=source)
    assert report.metric is None  # the gate's metric needs labels
    assert any("recorded and not judged" in note for note in report.notes)
    assert not any("recorded and not judged" in note for note in check(served, "reduced", samples).notes)


def test_the_metric_through_the_endpoint_can_refuse(
    served: Served, tmp_path: Path, features: Any, scores: Any
) -> None:
    source = str(write_model(tmp_path / "source.onnx", linear_model()))
    samples = write_samples(tmp_path, features=features, target=scores)
    report = check(served, "reduced", samples, against=source, metric="mae", max_drop=0.001)
    assert report.metric is not None
    assert report.metric.drop == pytest.approx(0.01 / 3, rel=1e-2)  # one of three columns is off by 0.01
    assert not report.metric.passed
    assert not report.passed


def test_an_ensemble_is_compared_with_its_steps(
    served: Served, tmp_path: Path, features: Any, scores: Any
) -> None:
    labels = np.array([f"class {index}" for index in scores.argmax(axis=1)])
    report = check(served, "labelled", write_samples(tmp_path, features=features, target=labels))
    assert report.passed
    assert {item.against for item in report.checks} == {"steps"}
    assert {item.tolerance for item in report.checks} == {0.0}
    assert report.metric is not None
    assert report.metric.candidate == 1.0
    assert {item.model for item in report.mixing} == {"linear", "label"}
    assert any(item.mixed for item in report.mixing if item.model == "linear")


def test_an_ensemble_that_differs_from_its_steps_fails(served: Served, samples: Path) -> None:
    report = check(served, "unsteady", samples)
    assert not report.passed
    assert not any(item.passed for item in report.checks)


def test_text_without_a_batch_axis(served: Served, tmp_path: Path) -> None:
    samples = write_samples(tmp_path, x=np.array([[["ä", "b"]], [["cc", ""]]]))
    report = check(served, "unbatched", samples)
    assert report.passed
    assert {item.mode for item in report.checks} == {"single", "concurrent"}
    assert {item.values_count for item in report.checks} == {4}


def test_bfloat16(served: Served, tmp_path: Path) -> None:
    x = np.array([[1.5, -2.0], [3.0, 0.1]], np.float32)  # 0.1 is rounded on the way in
    report = check(served, "half", write_samples(tmp_path, x=x))
    assert report.passed
    assert {item.max_abs_error for item in report.checks} == {0.0}
    for url in (served.http, f"grpc://{served.grpc}"):
        with Client(url) as client:
            answer = client.model("half")(x=[[0.1, 2.0]])["y"]
        assert answer.dtype.name == "bfloat16"
        assert answer.astype(np.float32).tolist() == [[0.10009765625, 2.0]]


def test_tensors_of_rank_0_for_a_sample(served: Served, tmp_path: Path) -> None:
    report = check(served, "flat", write_samples(tmp_path, x=np.arange(6)[:, None]))
    assert report.passed
    assert {item.values_count for item in report.checks} == {6}


def test_one_protocol_is_compared_and_noted(served: Served, samples: Path) -> None:
    report = validate(served.repository, "linear", samples, grpc_url=served.grpc)
    assert {item.protocol for item in report.checks} == {"grpc"}
    assert any("only grpc was compared" in note for note in report.notes)


def test_the_report_can_be_written_as_json(served: Served, samples: Path) -> None:
    report = check(served, "linear", samples)
    written = json.loads(json.dumps(report.json(), allow_nan=False))
    assert written["passed"] is True
    assert written["samples_count"] == 12
    assert written["checks"][0]["values_count"] == 36
    assert written["mixing"][0]["mixed"] is True


def test_the_embedded_server_is_started_where_none_is_named(served: Served, samples: Path) -> None:
    # Other models are not loaded: one that is broken does not stop this one's validation.
    broken = write_entry(served.repository, "broken", "max_batch_size: 4\n" + LINEAR, linear_model())
    (broken / "model.onnx").write_bytes(b"nothing")
    assert validate(served.repository, "linear", samples).passed


def test_nothing_to_compare_with_is_an_error(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="nothing to compare 'counter' with"):
        check(served, "counter", write_samples(tmp_path, x=np.ones((2, 3), np.float32)))


def test_zero_compared_values_are_an_error(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="not one value of 'unbatched' was compared"):
        check(served, "unbatched", write_samples(tmp_path, x=np.empty((2, 0, 2), "S1")))


def test_a_source_that_is_another_model(served: Served, samples: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.onnx", identity_model("float"))
    with pytest.raises(ValidationError, match=r"not the source of 'linear': it has no input 'features'"):
        check(served, "linear", samples, against=str(other))
    with pytest.raises(UsageError, match="is an ensemble"):
        check(served, "labelled", samples, against=str(other))


def test_wrong_names_samples_and_budgets(
    served: Served, samples: Path, tmp_path: Path, features: Any
) -> None:
    with pytest.raises(RepositoryError, match="no model 'nothing'"):
        check(served, "nothing", samples)
    with pytest.raises(SamplesError, match="lacks an array for 'x'"):
        check(served, "flat", samples)
    with pytest.raises(SamplesError, match="does not fit"):
        check(served, "linear", write_samples(tmp_path, features=features[:, :2]))
    with pytest.raises(UsageError, match="a budget needs a metric"):
        check(served, "linear", write_samples(tmp_path, features=features), max_drop=0.1)


def test_what_is_wrong_with_a_metric_is_told_before_a_server_starts(tmp_path: Path, samples: Path) -> None:
    folder = tmp_path / "repository" / "m" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text('name: "m"')
    gate = {"metric": "planted:score", "max_drop": 0.0}
    text = text_from_manifest(replace(manifest("m", "int8", 0.0), gate=gate))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="names Python code") as error:
        validate(tmp_path / "repository", "m", samples)
    assert "--allow-code" in str(error.value)
    with pytest.raises(UsageError, match="no metric is named 'acuracy'"):
        validate(tmp_path / "repository", "m", samples, metric="acuracy")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("served", "expected", "tolerance", "passed", "error"),
    [
        ([1.0, NAN, INF], [1.0, NAN, INF], 1e-4, True, 0.0),
        ([1.0, NAN], [1.0, 2.0], 1e-4, False, INF),
        ([1.0, NAN], [1.0, 2.0], None, False, INF),
        ([-INF], [INF], 1e-4, False, INF),
        ([1.0, 2.0003], [1.0, 2.0], 1e-4, True, 3e-4),  # 1e-4 * (2 + 2)
        ([1.0, 2.0005], [1.0, 2.0], 1e-4, False, 5e-4),
        ([0.0003, 2.0], [0.0, 2.0], 1e-4, False, 3e-4),  # 1e-4 * (2 + 0)
        ([1.0, -1e9], [1.0002, -1e9], 1e-4, True, 2e-4),  # a mask says nothing about the scale
        ([1.0, -1e9], [1.001, -1e9], 1e-4, False, 1e-3),
        ([1.0], [9.0], None, True, 8.0),
        ([], [], 1e-4, True, 0.0),
    ],
)
def test_floats(
    served: list[float], expected: list[float], tolerance: float | None, passed: bool, error: float
) -> None:
    found = compare("y", np.array(served), np.array(expected), tolerance)
    assert found.passed is passed
    assert found.max_abs_error == pytest.approx(error)


def test_an_infinite_error_is_null_in_json() -> None:
    check = Check(
        protocol="http",
        mode="single",
        against="file",
        output="y",
        samples_count=1,
        values_count=1,
        max_abs_error=INF,
        max_rel_error=0.5,
        tolerance=1e-4,
        passed=False,
        worst=None,
    )
    record = check.json()
    assert (record["max_abs_error"], record["max_rel_error"]) == (None, 0.5)


def test_everything_else_must_be_equal() -> None:
    found = compare("y", np.array([1, 2, 9]), np.array([1, 2, 4]), 0.0)
    assert (found.passed, found.max_abs_error, found.worst) == (False, 5.0, (2,))
    text = np.array([b"a", b"b"], object)
    assert compare("y", text, text.copy(), 0.0).passed
    found = compare("y", text, np.array([b"a", b"c"], object), 0.0)
    assert (found.passed, found.worst) == (False, (1,))
    assert not compare("y", np.array([True]), np.array([False]), 0.0).passed
    with pytest.raises(ValidationError, match="cannot be compared"):
        compare("y", np.zeros((2, 1)), np.zeros(2), 0.0)


def test_a_model_served_in_sequences_is_said_to_be_one(tmp_path: Path) -> None:
    text = "g (float[batch, 1] x, float[batch, 1] START) => (float[batch, 1] y) { y = Add(x, START) }"
    write_model(tmp_path / "model.onnx", model_from_text(text))
    control = {
        "name": "START",
        "control": [{"kind": "CONTROL_SEQUENCE_START", "fp32_false_true": [0, 1]}],
    }
    request = BuildRequest(
        name="steps",
        source=str(tmp_path / "model.onnx"),
        repository=tmp_path / "repository",
        config={"sequence_batching": {"control_input": [control]}},
    )
    build(request)
    np.savez(tmp_path / "x.npz", x=np.ones((2, 1), np.float32))
    with pytest.raises(ValidationError, match="served in sequences"):
        validate(tmp_path / "repository", "steps", tmp_path / "x.npz")
