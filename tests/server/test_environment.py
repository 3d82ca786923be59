"""The server's environment: built once, found at once, whole or not there."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tritonsmith.errors import ProvisionError
from tritonsmith.server import environment as environment_module
from tritonsmith.server.environment import (
    ServerEnvironment,
    cache_folder,
    ensure_environment,
    find_environment,
    stage_requirements,
)
from tritonsmith.server.interpreter import (
    download_library,
    library_version,
    probe_interpreter,
    survey,
    what_lacks,
)
from tritonsmith.server.provision import run_pip, unpack_wheel

# Builds the layer with one small package and prints every progress line, then the folder.
BUILD = """
from tritonsmith.server.environment import ensure_environment
print("ready", ensure_environment(["iniconfig==2.1.0"], say=lambda line: print(line, flush=True)).folder)
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server_environment: ServerEnvironment) -> Path:
    """A cache, with a space in its path, that holds the base environment and nothing else."""
    environments = tmp_path / "the cache" / "environments"
    environments.mkdir(parents=True)
    (environments / server_environment.folder.name).symlink_to(server_environment.folder)
    monkeypatch.setenv("TRITONSMITH_CACHE", str(environments.parent))
    return environments.parent


def start_build(**variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


def layers(cache: Path) -> list[Path]:
    return [path for path in (cache / "environments").glob("layer-*") if path.is_dir()]


def test_a_complete_environment_is_found_at_once_and_without_the_network(
    server_environment: ServerEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    said: list[str] = []
    before = time.perf_counter()
    assert ensure_environment(say=said.append) == server_environment
    assert time.perf_counter() - before < 0.05
    assert find_environment() == server_environment
    assert said == []


def test_the_environment_has_the_pins(server_environment: ServerEnvironment) -> None:
    asked = "import numpy, onnxruntime, openvino, ssl; print(numpy.__version__)"
    done = subprocess.run(
        [server_environment.python, "-c", asked], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1.26.4"


def test_a_killed_install_does_not_break_the_next(own_cache: Path) -> None:
    first = start_build()
    while not layers(own_cache):
        time.sleep(0.01)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (layer,) = layers(own_cache)
    assert not (layer / "environment.json").exists()  # it was caught in the act
    said, _ = start_build().communicate(timeout=120)
    assert said.strip().endswith(f"ready {layer}")
    done = subprocess.run(
        [layer / "bin" / "python3", "-c", "import iniconfig, numpy, pip; print(numpy.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "1.26.4"  # the base's, seen through the layer


def test_a_second_build_waits_for_the_first(own_cache: Path) -> None:
    first = start_build()
    while not layers(own_cache):
        time.sleep(0.01)
    second = start_build()
    said_first, _ = first.communicate(timeout=120)
    said_second, _ = second.communicate(timeout=120)
    (layer,) = layers(own_cache)
    assert "adding the packages of the Python stages: iniconfig==2.1.0" in said_first
    assert "waiting for it" in said_second
    assert "adding" not in said_second
    assert said_first.split()[-1] == said_second.split()[-1] == str(layer).split()[-1]


def test_a_failed_install_says_why_and_leaves_nothing(own_cache: Path) -> None:
    with pytest.raises(ProvisionError, match=r"no-such-package-of-tritonsmith") as caught:
        ensure_environment(["no-such-package-of-tritonsmith==1"])
    assert "No matching distribution" in str(caught.value)
    assert "check the name and version" in str(caught.value)
    assert not layers(own_cache)


def test_a_lost_part_makes_it_incomplete(own_cache: Path) -> None:
    layer = ensure_environment(["iniconfig==2.1.0"])
    (layer.folder / "bin" / "python3").unlink()
    said: list[str] = []
    again = ensure_environment(["iniconfig==2.1.0"], say=said.append)
    assert again == layer
    assert said
    assert (layer.folder / "bin" / "python3").exists()


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRITONSMITH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "tritonsmith"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "tritonsmith"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tritonsmith"
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder().is_dir()


def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ProvisionError, match="TRITONSMITH_CACHE") as caught:
        cache_folder()
    assert str(tmp_path / "file" / "cache") in str(caught.value)


def test_a_read_only_home_moves_pips_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provision = importlib.import_module("tritonsmith.server.provision")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PIP_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HOME", "/proc/self")  # not even root writes there
    assert provision.pip_environment(tmp_path / "tmp")["PIP_CACHE_DIR"] == str(tmp_path / "own" / "pip")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "PIP_CACHE_DIR" not in provision.pip_environment(tmp_path / "tmp")


def test_stage_requirements_are_the_union(tmp_path: Path) -> None:
    for name, text in {"a": "pillow>=11\n# a comment\n\n", "b": "tokenizers  # why\npillow>=11\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "requirements.txt").write_text(text)
    (tmp_path / "c").mkdir()
    assert stage_requirements(tmp_path) == ("pillow>=11", "tokenizers")
    (tmp_path / "c" / "requirements.txt").write_text("pillow\n-r ../other.txt\n")
    with pytest.raises(ProvisionError, match=r"c/requirements.txt, line 2"):
        stage_requirements(tmp_path)


def test_a_wheel_is_unpacked_with_its_modes_and_never_outside(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tool-1.0-py3-none-any.whl", "w") as archive:
        binary = zipfile.ZipInfo("tool/run")
        binary.external_attr = 0o100755 << 16
        archive.writestr(binary, "#!/bin/sh\n")
        archive.writestr("tool-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
        archive.writestr("tool-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tool-1.0.dist-info/RECORD", "")
    path = str(wheels / "tool-1.0-py3-none-any.whl")
    folder = unpack_wheel(path, tmp_path / "unpacked")
    assert os.access(folder / "tool" / "run", os.X_OK)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped", "")
    with pytest.raises(ProvisionError, match="outside") as caught:
        unpack_wheel(path, tmp_path / "again")
    assert "../escaped" in str(caught.value)
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob("escaped"))


def test_pip_of_an_unreachable_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    arguments = ["download", "--no-cache-dir", "--dest", str(tmp_path), "iniconfig"]
    with pytest.raises(ProvisionError, match="cannot have it") as caught:
        run_pip(Path(sys.executable), arguments, scratch=tmp_path, what="cannot have it")
    assert "index" in str(caught.value)


def test_the_libpython_is_of_the_very_same_version(server_environment: ServerEnvironment) -> None:
    (library,) = server_environment.python_library_folder.iterdir()
    assert library_version(server_environment.python, library) == server_environment.python_version
    assert any(what_lacks(probe) is None for probe in survey())


@pytest.mark.skipif(
    not Path("/usr/bin/python3.11").exists() or not Path("/usr/bin/apt-get").exists(),
    reason="needs Debian 12's own Python",
)
def test_a_libpython_comes_from_the_distribution(tmp_path: Path) -> None:
    probe = probe_interpreter(Path("/usr/bin/python3.11"))
    assert probe is not None
    library = download_library(probe, tmp_path / "down loads")
    if library is None:
        pytest.skip("the distribution's archive is out of reach, or has another version")
    assert library.name == "libpython3.11.so.1.0"
    assert library_version(probe.python, library) == probe.version


def test_no_python_is_told_with_all_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = importlib.import_module("tritonsmith.server.interpreter")
    probe = probe_interpreter(Path(sys.executable))
    assert probe is not None
    lacking = [
        dataclasses.replace(probe, python=Path("/opt/a/python3.11"), version="3.11.0", library=None),
        dataclasses.replace(probe, python=Path("/opt/b/python3.13"), version="3.13.0", has_headers=False),
    ]
    monkeypatch.setattr(interpreter, "survey", lambda: tuple(lacking))
    with pytest.raises(ProvisionError, match="no Python here") as caught:
        interpreter.find_interpreter(tmp_path)
    assert "/opt/a/python3.11: no shared libpython 3.11.0" in str(caught.value)
    assert "/opt/b/python3.13: numpy 1.26 has no wheel for Python 3.13" in str(caught.value)


def test_pins_are_of_numpy_1() -> None:
    assert "numpy==1.26.4" in environment_module.BASE_PINS.read_text().splitlines()


def test_a_python_without_ensurepip_borrows_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server_environment: ServerEnvironment
) -> None:
    """Debian leaves ensurepip to a package of its own, python3-venv."""
    probe = probe_interpreter(server_environment.python)
    assert probe is not None
    lacking = dataclasses.replace(probe, has_ensurepip=False)
    monkeypatch.setattr(environment_module, "probe_interpreter", lambda _: lacking)
    said: list[str] = []
    python = environment_module._make_venv(tmp_path / "environment", probe.python, say=said.append)
    done = subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True, text=True)
    assert str(tmp_path / "environment") in done.stdout
    assert "brings no pip of its own" in said[0]
