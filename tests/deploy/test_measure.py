"""What is measured of a served repository, against models that are made to need exactly so much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritonsmith.cli import main
from tritonsmith.client import Signature, Tensor
from tritonsmith.deploy.largest import bytes_of, largest_request
from tritonsmith.deploy.measure import compute_time_s, instance_count, load_times_s, measure_repository
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.measurements_file import (
    check_measurements,
    fingerprint_of_repository,
    read_measurements,
    write_measurements,
)
from tritonsmith.errors import DeployError
from tritonsmith.server.environment import ServerEnvironment

MIB = 1 << 20
INITIALIZE_S = 0.5
EXECUTE_S = 0.1
HELD_MIB = 128  # by an execution, and given back
MODEL = f"""
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        time.sleep({INITIALIZE_S})

    def execute(self, requests):
        taken = np.ones({HELD_MIB} << 17)
        time.sleep({EXECUTE_S})
        return [self.answer(pb.get_input_tensor_by_name(r, "x").as_numpy()) for r in requests]

    def answer(self, x):
        return pb.InferenceResponse([pb.Tensor("y", np.zeros((len(x), 1 << 19), np.float32))])
"""
# 4 samples of [x]; each answered with 2 MiB
CONFIG = """
backend: "python"
max_batch_size: 4
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [524288] }]
instance_group { count: 2 kind: KIND_CPU }
"""
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [524288] }]
ensemble_scheduling { step { model_name: "greedy" model_version: -1
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""


def write_repository(folder: Path) -> Path:
    for name, config in {"greedy": CONFIG, "whole": ENSEMBLE}.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config)
    (folder / "greedy" / "1" / "model.py").write_text(MODEL)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("measured") / "greedy repository")


@pytest.fixture(scope="module")
def measured(repository: Path, server_environment: ServerEnvironment) -> Measurements:
    """One run, whose largest request is 4 rows of 256 floats."""
    samples = repository.parent / "x.npz"
    np.savez(samples, x=np.zeros((3, 256), np.float32))
    return measure_repository(
        repository, samples={"greedy": samples}, axis_length=10, runs=1, load_s=0.5, say=lambda line: None
    )


def test_each_model(measured: Measurements) -> None:
    greedy, whole = measured.models
    assert (greedy.name, greedy.backend, greedy.instances) == ("greedy", "python", 2)
    assert greedy.request_bytes == 4 * 256 * 4
    assert greedy.response_bytes == 4 * 2 * MIB
    assert greedy.load_s is not None
    assert INITIALIZE_S <= greedy.load_s <= measured.ready_s
    assert greedy.compute_s is not None
    assert EXECUTE_S <= greedy.compute_s < EXECUTE_S + 1
    assert (whole.name, whole.instances, whole.load_s) == ("whole", 0, None)
    assert whole.request_bytes == 4 * 10 * 4  # it had no samples
    assert whole.response_bytes == 4 * 2 * MIB


def test_whole_server(measured: Measurements, repository: Path) -> None:
    assert measured.repository == "greedy repository"
    assert measured.fingerprint == fingerprint_of_repository(repository, None)
    assert INITIALIZE_S <= measured.ready_s < 60
    assert 0 < measured.stop_s < 30
    # Two instances are busy at once; what they took is not there before.
    assert measured.idle_bytes > 20 * MIB
    assert measured.peak_bytes - measured.idle_bytes > 2 * HELD_MIB * MIB
    assert measured.peak_bytes - measured.idle_bytes < 3.5 * HELD_MIB * MIB
    # At least a MiB and an answer of 8 MiB in each instance.
    assert 2 * 9 * MIB <= measured.shm_bytes < 80 * MIB
    assert 0 < measured.cpu_s_per_s <= measured.machine["cpu_count"]  # type: ignore[operator]
    assert isinstance(measured.machine["load_before"], float)
    assert measured.versions["triton"] == "2.51.0"


def test_file_round_trip_and_its_damages(measured: Measurements, tmp_path: Path) -> None:
    file = tmp_path / "measurements.json"
    write_measurements(file, measured)
    assert read_measurements(file) == measured
    whole = json.loads(file.read_text())
    for damage, said in (
        ({"schema": 99}, "schema 99"),
        ({"ready_s": None}, "ready_s"),
        ({"ready_s": "4"}, "ready_s"),
        ({"peak_bytes": -1}, "peak_bytes"),
        ({"unknown": 1}, "unknown"),
        ({"stop_s": float("nan")}, "NaN"),
        ({"stop_s": float("inf")}, "Infinity"),
        ({"peak_bytes": 10**400}, "peak_bytes"),
        ({"models": [{"name": "a"}]}, "missing or unknown"),
    ):
        file.write_text(json.dumps(whole | damage))
        with pytest.raises(DeployError, match=said):
            read_measurements(file)
    with pytest.raises(DeployError, match="cannot be read"):
        read_measurements(tmp_path / "none.json")


def test_measurements_of_another_repository_are_refused(
    measured: Measurements, repository: Path, tmp_path: Path
) -> None:
    check_measurements(measured, repository)
    other = write_repository(tmp_path / "other")
    check_measurements(measured, other)  # the same configurations
    (other / "greedy" / "config.pbtxt").write_text(CONFIG.replace("count: 2", "count: 3"))
    with pytest.raises(DeployError, match="other configurations"):
        check_measurements(measured, other)


def test_fingerprint_is_of_the_target(repository: Path, tmp_path: Path) -> None:
    other = write_repository(tmp_path / "other")
    (other / "greedy" / "configs").mkdir()
    (other / "greedy" / "configs" / "big.pbtxt").write_text(CONFIG.replace("count: 2", "count: 8"))
    assert fingerprint_of_repository(other, None) == fingerprint_of_repository(repository, None)
    assert fingerprint_of_repository(other, "big") != fingerprint_of_repository(other, None)


def test_manifests_count_where_both_have_them(measured: Measurements, repository: Path) -> None:
    configurations, _, none = measured.fingerprint.partition("/")
    assert none == ""
    built = replace(measured, fingerprint=f"{configurations}/{'a' * 64}")
    check_measurements(built, repository)  # here nothing is built: nothing to compare


def test_loading_times_from_the_log() -> None:
    log = """
I1231 23:59:59.500000 7 model_lifecycle.cc:472] "loading: a:1"
I1231 23:59:59.750000 7 model_lifecycle.cc:472] "loading: b:2"
I1231 23:59:59.900000 7 model_lifecycle.cc:839] "successfully loaded 'b'"
I1231 23:59:59.999999 7 model_lifecycle.cc:839] "successfully loaded 'a'"
"""
    assert load_times_s(log) == pytest.approx({"a": 0.499999, "b": 0.15})


def test_compute_time_is_of_the_largest_batch() -> None:
    def batch(size: int, count: int, *ns: int) -> dict[str, Any]:
        parts = ("compute_input", "compute_infer", "compute_output")
        found = {part: {"count": count, "ns": one} for part, one in zip(parts, ns, strict=True)}
        return {"batch_size": size, **found}

    statistics = {"batch_stats": [batch(8, 2, 10**9, 2 * 10**9, 10**9), batch(2, 1, 0, 9 * 10**9, 0)]}
    assert compute_time_s(statistics) == 2.0
    assert compute_time_s({"batch_stats": [batch(8, 0, 0, 0, 0)]}) is None


def test_instances_of_all_groups() -> None:
    groups = [{"count": 2, "gpus": []}, {"count": 3, "gpus": [0, 1]}]
    assert instance_count({"instance_group": groups}) == 8
    assert instance_count({}) == 0


def signature(*inputs: Tensor, batch: int = 3) -> Signature:
    return Signature(model="m", version="", max_batch_size=batch, inputs=inputs, outputs=(), config={})


def test_largest_samples_fill_the_batch(tmp_path: Path) -> None:
    text = Tensor(name="text", datatype="BYTES", shape=(-1, 1))
    np.savez(tmp_path / "x.npz", text=np.array([["a"], ["longest"], ["bbb"]]))
    request = largest_request(signature(text, batch=5), tmp_path / "x.npz")
    assert request["text"].ravel().tolist() == [b"longest", b"bbb", b"a", b"longest", b"bbb"]
    assert bytes_of(request) == 5 * 4 + 7 + 3 + 1 + 7 + 3


def test_without_samples_free_axes_have_the_stated_length() -> None:
    ids = Tensor(name="ids", datatype="INT64", shape=(-1, -1, 7))
    request = largest_request(signature(ids), None, axis_length=11)
    assert request["ids"].shape == (3, 11, 7)
    assert request["ids"].dtype == np.int64
    assert bytes_of(request) == 3 * 11 * 7 * 8
    with pytest.raises(DeployError, match="free axes"):
        largest_request(signature(ids), None)
    with pytest.raises(DeployError, match="takes strings"):
        largest_request(signature(Tensor(name="t", datatype="BYTES", shape=(-1, 1))), None)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{missing}"], 1, "is not a model repository"),
        (["{repository}", "--samples", "nobody=x.npz"], 1, "'nobody'"),
        (["{repository}", "--samples", "greedy"], 2, "NAME=X.npz"),
        (["{repository}", "--runs", "0"], 1, "no run"),
        (["{repository}", "--target", "typo"], 1, "'typo'"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    code: int,
    said: str,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [one.format(missing=tmp_path / "none", repository=repository) for one in arguments]
    assert main(["deploy", "measure", *filled, "--out", str(tmp_path / "m.json")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()
