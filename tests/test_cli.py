"""The command line: help, exit codes, where things are printed, and wrong input of every kind."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from onnx_models import linear_model, linear_weights, model_from_text, write_model
from publishing import publish_payload
from python_models import processes_under, still_running
from python_models import write_model as write_python
from served_models import Addresses
from tritonsmith.artifact import sha256_of
from tritonsmith.cli import main
from tritonsmith.server.environment import ServerEnvironment

VERBS = (
    *("convert", "compress", "build", "plans", "lint", "serve"),
    *("validate", "bench", "infer", "deploy", "doctor"),
)
HEAVY = (
    "tensorflow", "keras", "torch", "transformers", "onnx", "onnxruntime", "onnxslim", "openvino", "sklearn",
    "matplotlib", "numpy", "ml_dtypes", "grpc", "tritonclient",
)  # fmt: skip
COMMAND = (sys.executable, "-m", "tritonsmith")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and samples, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    onnx = write_model(folder / "linear.onnx", linear_model()).read_bytes()
    random = np.random.default_rng(0)
    features = random.normal(size=(12, 4)).astype(np.float32)
    weights = linear_weights()
    target = (features @ weights["weight"] + weights["bias"]).argmax(axis=1)
    for name, content in {
        "empty.onnx": b"",
        "cut.onnx": onnx[:60],
        "text.onnx": b"hello\n",
        "onnx.h5": onnx,
        "onnx.keras": onnx,
        "onnx.pt2": onnx,
        "hdf5.onnx": b"\x89HDF\r\n\x1a\n" + bytes(200),
        "cut.h5": b"\x89HDF\r\n\x1a\n" + bytes(200),
        "empty.h5": b"",
        "empty.pt2": b"",
        "empty.keras": b"",
        "cut.pt2": b"PK\x03\x04" + bytes(50),
        "file": b"x",
        "empty.npz": b"",
        "text.npz": b"hello\n",
        "typo.toml": b'[model]\nname = "a"\nsourc = "linear.onnx"\n',
        "cut.toml": b'[model\nname = "a"',
    }.items():
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    np.savez(folder / "good.npz", features=features, target=target)
    np.savez(folder / "other.npz", features=random.normal(size=(12, 4)).astype(np.float32))
    np.savez(folder / "missing.npz", target=target)
    np.savez(folder / "extra.npz", features=features, more=features, target=target)
    np.savez(folder / "shape.npz", features=features[:, :3], target=target)
    np.savez(folder / "nan.npz", features=features * np.nan, target=target)
    np.savez(folder / "none.npz", features=features[:0], target=target[:0])
    np.savez(folder / "short.npz", features=features, target=target[:5])
    return folder


@pytest.fixture(scope="module")
def repository(files: Path) -> Path:
    """A repository with version 1 of `linear`."""
    folder = files / "my repository"
    assert main(["build", str(files / "linear.onnx"), "--name", "linear", "--repository", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], repository: Path) -> Callable[..., str]:
    """Runs a command that must fail: no result, one message, no change in the repository."""
    capsys.readouterr()
    before = tree(repository)

    def run(arguments: list[str], code: int = 1) -> str:
        try:
            got = main(arguments)
        except SystemExit as stop:  # argparse
            got = int(str(stop.code))
        captured = capsys.readouterr()
        assert got == code, captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert tree(repository) == before
        _, *messages = re.split(r"^(?:tritonsmith.*: )?error: ", captured.err, flags=re.MULTILINE)
        assert len(messages) == 1
        return messages[0]

    return run


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the hash of its content."""
    return {
        str(path.relative_to(folder)): sha256_of(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def read_json(text: str) -> Any:
    """Strict JSON: no NaN, nothing after it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return read_json(capsys.readouterr().out)


# --- help and imports ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)])
def test_help_is_quick(verb: tuple[str, ...]) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([*COMMAND, *verb, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert done.stdout.startswith(f"usage: tritonsmith {' '.join(verb)}".rstrip())
    assert done.stderr == ""
    assert statistics.median(seconds) < 0.5


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)])
def test_help_imports_nothing_heavy(verb: tuple[str, ...]) -> None:
    code = f"""
import sys
from tritonsmith.cli import main
try:
    main({[*verb, "--help"]})
except SystemExit:
    pass
print("heavy:", *sorted({HEAVY} & sys.modules.keys()))
""".replace(str(HEAVY), repr(set(HEAVY)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("tritonsmith ")


# --- what works ---------------------------------------------------------------------------------------


def test_convert(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder" / "model.onnx"
    arguments = ["convert", "linear.onnx", "--out", str(out)]
    value = run_json(arguments, capsys)
    assert (value["path"], value["precision"], value["batched"]) == (str(out), "fp32", True)
    assert value["inputs"] == [{"name": "features", "dtype": "float32", "shape": ["batch", 4]}]
    assert main([*arguments, "--force"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == [
        "  takes features: float32[batch, 4]",
        "  gives scores: float32[batch, 3]",
    ]
    assert captured.out.startswith(f"{out}  {out.stat().st_size} B, fp32")
    assert captured.err.startswith("reading linear.onnx")


def test_build(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "linear.onnx", "--name", "linear", "--repository", str(repository)]
    value = run_json(arguments, capsys)
    assert (value["name"], value["version"], value["unchanged"]) == ("linear", 1, True)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("linear version 1, fp32: ")
    assert "unchanged" in captured.out.splitlines()[0]
    assert captured.err == ""


def test_a_recipe_builds_all_that_it_names(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
        [model]
        name = "scores"
        source = "{files / "linear.onnx"}"
        [[ensemble]]
        name = "all"
        [[ensemble.step]]
        model = "scores"
        inputs = {{ features = "features" }}
        outputs = {{ scores = "scores" }}
    """)
    values = run_json(["build", str(recipe), "--repository", str(tmp_path / "repository")], capsys)
    assert [value["name"] for value in values] == ["scores", "all"]


def test_results_and_progress_go_apart(files: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "convert", "linear.onnx", "--out", str(tmp_path / "model.onnx"), "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=files,
    )
    assert read_json(done.stdout)["format"] == "onnx"
    assert "simplifying" in done.stderr


def test_infer(served_models: Addresses, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["infer", "affine", "--input", "x=[1, 2, 3]", "--url", served_models.grpc]
    assert run_json(arguments, capsys)["outputs"]["y"]["data"] == [3, 5, 7]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1] == "  [[3. 5. 7.]]"
    assert captured.err == ""


def test_bench(served_models: Addresses, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "affine", "--url", served_models.http, "--concurrency", "1:2"]
    arguments += ["--interval-ms", "100", "--rounds", "1", "--out", str(tmp_path / "out")]
    value = run_json(arguments, capsys)
    assert (value["protocol"], [level["concurrency"] for level in value["levels"]]) == ("http", [1, 2])
    stored = read_json((tmp_path / "out" / "bench.json").read_text())
    latencies = [level.pop("latencies_us") for level in stored["levels"]]
    assert all(latencies)
    assert stored == value
    assert main(arguments) == 2
    assert "report.html exists" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("affine over http, ")
    assert "inferences/s" in captured.out
    assert captured.err.startswith("round 1 of 1: affine at concurrency 1\n")


def test_doctor(server_environment: ServerEnvironment, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    findings = read_json(capsys.readouterr().out)
    assert findings
    assert code == (1 if any(finding["status"] == "fail" for finding in findings) else 0)


def test_a_server_is_served_validated_and_stopped(
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server_environment: ServerEnvironment,
) -> None:
    command = [*COMMAND, "serve", str(repository), "--http-port", "0", "--grpc-port", "0"]
    command += ["--metrics-port", "0", "--json", "--", "--log-verbose=1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        addresses = read_json(read_until(process.stdout, "}\n"))
        family = processes_under(process.pid)
        urls = ["--url", addresses["http"], "--url", addresses["grpc"]]
        arguments = [
            "validate",
            str(repository),
            "linear",
            "--samples",
            "good.npz",
            "--against",
            "linear.onnx",
        ]
        value = run_json([*arguments, *urls], capsys)
        assert value["passed"]
        assert value["metric"]["candidate"] == 1.0
        assert main([*arguments, *urls]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "passed"
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert out == ""
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert addresses["pid"] in family
    assert still_running(family) == set()


def read_until(stream: IO[str], end: str) -> str:
    text = ""
    while not text.endswith(end):
        line = stream.readline()
        assert line, "the program ended"
        text += line
    return text


# --- wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["convert", "linear.onnx"],
        ["convert", "linear.onnx", "--out", "empty"],
        ["convert", "linear.onnx", "--out", "linear.onnx"],
        ["convert", "linear.onnx", "--out", "new.onnx", "--opset", "99"],
        ["convert", "linear.onnx", "--out", "new.onnx", "--server", "1.2"],
        ["build", "linear.onnx", "--name", "a"],
        ["build", "linear.onnx", "--repository", "my repository"],
        ["build", "typo.toml", "--repository", "my repository", "--name", "a"],
        ["build", "linear.onnx", "--name", "a", "--repository", "my repository", "--precision", "int4"],
        ["build", "linear.onnx", "--name", "a", "--repository", "my repository", "--precision", "int8"],
        ["build", "linear.onnx", "--name", "a", "--repository", "my repository", "--max-drop", "0.1"],
        ["build", "linear.onnx", "--name", "a", "--repository", "my repository", "--evaluation", "good.npz"],
        ["build", "linear.onnx", "--name", "a", "--repository", "my repository", "--max-batch-size", "-1"],
        ["validate", "my repository", "linear", "--samples", "good.npz", "--url", "localhost"],
        ["validate", "my repository", "linear"],
        ["bench", "linear", "--concurrency", "8:1"],
        ["bench", "linear", "--rounds", "0"],
        ["bench", "linear", "--url", "grpc://127.0.0.1:9", "--repository", "my repository"],
        ["infer", "linear"],
        ["serve", "my repository", "--http-port", "70000"],
        ["serve", "my repository", "--http-port", "5", "--grpc-port", "5"],
        ["serve", "my repository", "--load-model", "linear"],
        ["serve", "my repository", "--", "--http-port=1"],
        ["serve", "my repository", "more"],
    ],
    ids=" ".join,
)
def test_wrong_usage(refused: Callable[..., str], arguments: list[str], files: Path) -> None:
    refused(arguments, 2)
    assert not (files / "new.onnx").exists()


SOURCES = {
    "nope.onnx": "nope.onnx",
    "empty.onnx": "an empty file",
    "cut.onnx": "cut.onnx",
    "text.onnx": "a text file",
    "onnx.h5": "rename it to *.onnx",
    "onnx.keras": "an ONNX model",
    "onnx.pt2": "an ONNX model",
    "hdf5.onnx": "an HDF5 file",
    "cut.h5": "cut.h5",
    "cut.pt2": "cut.pt2",
    "empty.h5": "an empty file",
    "empty.keras": "an empty file",
    "empty.pt2": "an empty file",
    "file": "a text file",
    "empty": "an empty folder",
    "no_such_module:factory": "no_such_module",
}


@pytest.mark.parametrize(("source", "message"), SOURCES.items(), ids=SOURCES)
def test_a_source_that_is_none(refused: Callable[..., str], files: Path, source: str, message: str) -> None:
    before = tree(files)
    assert message in refused(["convert", source, "--out", "new.onnx"])
    assert message in refused(["build", source, "--name", "linear", "--repository", "my repository"])
    assert tree(files) == before


SAMPLES = {
    "nope.npz": "nope.npz",
    "empty.npz": "cannot be read as .npz",
    "text.npz": "cannot be read as .npz",
    "missing.npz": "lacks an array for 'features'",
    "extra.npz": "an array that no input takes: 'more'",
    "shape.npz": "[12, 3]",
    "nan.npz": "NaN",
    "none.npz": "no samples",
    "short.npz": "unequal length",
    "other.npz": "no labels",
}


@pytest.mark.parametrize(("samples", "message"), SAMPLES.items(), ids=SAMPLES)
def test_samples_that_do_not_fit(refused: Callable[..., str], samples: str, message: str) -> None:
    arguments = ["build", "linear.onnx", "--name", "linear", "--repository", "my repository"]
    error = refused([*arguments, "--evaluation", samples, "--metric", "accuracy"])
    assert samples in error
    assert message in error


def test_calibration_on_the_evaluation_data(refused: Callable[..., str]) -> None:
    arguments = ["build", "linear.onnx", "--name", "linear", "--repository", "my repository"]
    arguments += ["--precision", "int8", "--calibration", "good.npz", "--evaluation", "good.npz"]
    assert "shares samples" in refused([*arguments, "--metric", "accuracy", "--max-drop", "0.5"])


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".", "..", "a b", ".hidden", "ü", "x" * 200])
def test_a_name_that_is_none(refused: Callable[..., str], files: Path, name: str) -> None:
    before = tree(files)
    error = refused(["build", "linear.onnx", "--name", name, "--repository", "my repository"])
    assert "cannot name a model" in error
    assert tree(files) == before


def test_a_repository_that_is_a_file(refused: Callable[..., str]) -> None:
    assert "file is a file" in refused(["build", "linear.onnx", "--name", "a", "--repository", "file"])
    assert "file is not a folder" in refused(["serve", "file"])
    assert "file is not a folder" in refused(["bench", "linear", "--repository", "file"])
    refused(["validate", "file", "linear", "--samples", "good.npz"])


def test_a_repository_that_is_not_writable(refused: Callable[..., str], tmp_path: Path) -> None:
    # /proc takes no files from root either.
    folder = Path("/proc/self/fd") if os.geteuid() == 0 else tmp_path
    tmp_path.chmod(0o555)
    error = refused(["build", "linear.onnx", "--name", "a", "--repository", str(folder / "repository")])
    assert str(folder) in error
    refused(["convert", "linear.onnx", "--out", str(folder / "model.onnx")])


@pytest.mark.parametrize("recipe", ["typo.toml", "cut.toml", "nope.toml"])
def test_a_recipe_that_is_wrong(refused: Callable[..., str], recipe: str) -> None:
    assert recipe in refused(["build", recipe, "--repository", "my repository"])


def test_a_port_in_use(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(["serve", "my repository", "--http-port", str(port)])
    assert str(port) in error


@pytest.mark.parametrize("verb", ["bench", "infer", "validate"])
def test_a_server_out_of_reach(refused: Callable[..., str], verb: str) -> None:
    arguments = {
        "bench": ["bench", "linear"],
        "infer": ["infer", "linear", "--input", "features=[1, 2, 3, 4]"],
        "validate": ["validate", "my repository", "linear", "--samples", "good.npz"],
    }
    assert "127.0.0.1:9" in refused([*arguments[verb], "--url", "grpc://127.0.0.1:9"])


def test_a_model_that_the_server_lacks(refused: Callable[..., str], served_models: Addresses) -> None:
    assert "'nope'" in refused(["bench", "nope", "--url", served_models.grpc])
    assert "'nope'" in refused(["infer", "nope", "--input", "x=1", "--url", served_models.http])


def test_inputs_that_do_not_fit(refused: Callable[..., str], served_models: Addresses) -> None:
    to_affine = ["infer", "affine", "--url", served_models.http]
    assert "'y'" in refused([*to_affine, "--input", "y=1"])
    assert "x" in refused([*to_affine, "--input", "x=[1, 2]"])
    assert "NAME=VALUE" in refused([*to_affine, "--input", "x"], 2)
    assert "nope.npy" in refused([*to_affine, "--input", "x=@nope.npy"], 2)


def test_a_folder_for_results_that_cannot_be_made(
    refused: Callable[..., str], served_models: Addresses
) -> None:
    error = refused(["bench", "affine", "--url", served_models.grpc, "--out", "file/out"])
    assert "file" in error


def test_a_model_that_triton_refuses(
    refused: Callable[..., str], tmp_path: Path, server_environment: ServerEnvironment
) -> None:
    write_python(tmp_path / "broken", "moody", initialize='raise ValueError("no weights today")')
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    error = refused(["serve", str(tmp_path / "broken"), *ports])
    assert "moody" in error
    assert "no weights today" in error


# --- a full disk --------------------------------------------------------------------------------------

BIG = 400_000  # floats


@pytest.fixture(scope="module")
def big(files: Path) -> Path:
    weight = np.random.default_rng(0).normal(size=(4, BIG // 4)).astype(np.float32)
    model = model_from_text(
        f"big (float[N, 4] x) => (float[N, {BIG // 4}] y) {{ y = MatMul(x, weight) }}", {"weight": weight}
    )
    return write_model(files / "big.onnx", model)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: that needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(refused: Callable[..., str], big: Path, full_disk: Path) -> None:
    publish_payload(full_disk / "repository", "old", name="old")
    before = tree(full_disk)
    error = refused(["build", str(big), "--name", "m", "--repository", str(full_disk / "repository")])
    assert "No space left" in error
    assert str(full_disk) in error
    assert "No space left" in refused(["convert", str(big), "--out", str(full_disk / "big.onnx")])
    assert tree(full_disk) == before


def test_a_full_disk_for_the_report(
    refused: Callable[..., str], served_models: Addresses, full_disk: Path
) -> None:
    room = os.statvfs(full_disk)
    (full_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize))
    arguments = ["bench", "affine", "--url", served_models.http, "--concurrency", "1", "--rounds", "1"]
    error = refused([*arguments, "--interval-ms", "100", "--out", str(full_disk / "out")])
    assert "No space left" in error
    assert str(full_disk) in error
    assert not any((full_disk / "out").iterdir())


def test_a_full_temporary_folder(big: Path, files: Path, tmp_path: Path, full_disk: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "build", str(big), "--name", "m", "--repository", str(tmp_path / "repository")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(full_disk)},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr
    assert not (tmp_path / "repository").exists()
    # ONNX Runtime keeps a mark of its own there.
    assert {path.name for path in full_disk.iterdir()} <= {".ses"}


def test_a_file_that_may_not_grow(big: Path, tmp_path: Path) -> None:
    """What a quota does; as root and as anyone."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [*COMMAND, "convert", str(big), "--out", str(tmp_path / "big.onnx")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- Ctrl-C, and a reader that goes away --------------------------------------------------------------

SLEEPER = """
import sys, time
def factory():
    print("asleep", file=sys.stderr, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["convert", "build"])
def test_a_signal_leaves_nothing(verb: str, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "temporary").mkdir()
    arguments = {
        "convert": ["--out", "out/model.onnx"],
        "build": ["--name", "m", "--repository", "repository"],
    }
    process = subprocess.Popen(
        [*COMMAND, verb, "sleeper:factory", *arguments[verb]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        assert process.stderr is not None
        read_until(process.stderr, "asleep\n")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    said = "interrupted\n" if number == signal.SIGINT else ""
    assert (process.returncode, out, err) == (128 + number, "", said)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["sleeper.py", "temporary"]


def test_ctrl_c_while_the_server_starts(tmp_path: Path, server_environment: ServerEnvironment) -> None:
    write_python(tmp_path / "models", "slow", initialize="time.sleep(60)")
    process = subprocess.Popen(
        [*COMMAND, "bench", "slow", "--repository", str(tmp_path / "models")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        read_until(process.stderr, f"starting Triton on {tmp_path / 'models'}\n")
        time.sleep(1.5)
        family = processes_under(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in err
    assert len(family) > 1
    assert still_running(family) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["build"]], ids=" ".join)
def test_a_reader_that_goes_away(repository: Path, arguments: list[str]) -> None:
    """As `tritonsmith ... | head -0` does."""
    if arguments == ["build"]:
        arguments = ["build", "linear.onnx", "--name", "linear", "--repository", str(repository), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
