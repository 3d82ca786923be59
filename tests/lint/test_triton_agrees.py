"""The same repository under lint and under a real Triton: what lint calls an error, Triton refuses.

Triton completes no configuration here, as in production.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from linted import DOUBLE, LINEAR, add_double, add_linear, add_model, ensemble, findings_of, step
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.server.options import ServerOptions
from tritonsmith.server.process import serve

TWICE = (step("double", "in", "once"), step("double", "once", "out"))
WARMUP = """
model_warmup { name: "one" batch_size: 1 inputs { key: "x"
  value { data_type: TYPE_FP32 dims: [3] input_data_file: "x.bin" } } }
"""
# model -> what Triton says of it, in part
BROKEN = {
    "batch_in_dims": "dims",
    "no_file": "missing",
    "zero_dim": "dimension must be integer >= 1, or -1",
    "no_type": "must specify 'data_type'",
    "no_dims": "must specify 'dims'",
    "no_backend": "no_backend",
    "no_platform": "no_platform",
    "renamed": "directory name must equal model name",
    "policy": "at least one version must be available",
    "no_version": "at least one version must be available",
    "no_warmup": "x.bin",
    "no_labels": "labels.txt",
    "unwritten": "input",
    "unused": "unused",
    "no_step": "no_step",
    "other_shape": "other_shape",
    "large_batch": "allows maximum batch size",
}
RIGHT = ("double", "by_filename", "twice", "twice_turned")


def write(repository: Path) -> None:
    add_double(repository)
    some = "version_policy { specific { versions: [1, 2] } }"
    add_double(repository, "by_filename", DOUBLE.replace('backend: "python"', some))
    add_model(repository, "twice", ensemble(*TWICE))
    add_model(repository, "twice_turned", ensemble(*TWICE[::-1]))
    add_linear(repository, "batch_in_dims", LINEAR.replace("[4]", "[-1, 4]"))
    (add_linear(repository, "no_file") / "1" / "model.onnx").unlink()
    for name, right, wrong in (
        ("zero_dim", "[3]", "[0]"),
        ("no_type", "data_type: TYPE_FP32 ", ""),
        ("no_dims", "dims: [3]", ""),
        ("no_backend", 'backend: "python"', ""),
        ("renamed", "max_batch_size", 'name: "another" max_batch_size'),
        ("policy", "max_batch_size", "version_policy { specific { versions: [2] } } max_batch_size"),
        ("no_platform", 'backend: "python"', 'platform: "onnx"'),
        ("no_version", "max_batch_size", "max_batch_size"),
        ("no_labels", '"y" data_type', '"y" label_filename: "labels.txt" data_type'),
    ):
        add_double(repository, name, DOUBLE.replace(right, wrong, 1))
    (repository / "no_backend" / "1" / "model.py").rename(repository / "no_backend" / "1" / "stage.py")
    (repository / "no_version" / "1").rename(repository / "no_version" / "01")
    add_double(repository, "no_warmup", DOUBLE + WARMUP)
    for name, config in (
        ("unwritten", ensemble(step("double", "inn", "out"))),
        ("unused", ensemble(step("double", "in", "once"), step("double", "in", "out"))),
        ("no_step", ensemble(step("dubble", "in", "out"))),
        ("other_shape", ensemble(*TWICE, dims="[4]")),
        ("large_batch", ensemble(*TWICE, size=8)),
    ):
        add_model(repository, name, config)


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory, server_environment: ServerEnvironment
) -> tuple[Path, dict[str, str]]:
    """The repository, and what one server said to each model that it would not load."""
    repository = tmp_path_factory.mktemp("lint") / "repository"
    write(repository)
    options = ServerOptions(
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        model_control="explicit",
        flags=("--disable-auto-complete-config",),
    )
    said: dict[str, str] = {}
    with serve(repository, options) as server, InferenceServerClient(server.http_address) as client:
        for name in (*RIGHT, *BROKEN):
            try:
                client.load_model(name)
            except InferenceServerException as error:
                said[name] = str(error)
        said["log"] = server.read_log()  # where a model that cannot even be read is explained
    return repository, said


def test_triton_refuses_what_lint_calls_an_error_and_takes_the_rest(
    refusals: tuple[Path, dict[str, str]],
) -> None:
    repository, said = refusals
    errors = {finding.model for finding in findings_of(repository) if finding.severity == "error"}
    assert errors == set(BROKEN)
    assert said.keys() - {"log"} == set(BROKEN)


@pytest.mark.parametrize(("name", "reason"), BROKEN.items())
def test_triton_gives_the_reason(refusals: tuple[Path, dict[str, str]], name: str, reason: str) -> None:
    _, said = refusals
    assert reason in said[name] or reason in said["log"]
