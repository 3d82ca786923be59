"""What the tests of containers share: an engine, the base image, the CPU image, the repository to serve."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_engine import Engine, NoEngine, open_engine
from tritonsmith.deploy.context import context_files

ROOT = Path(__file__).resolve().parents[2]
BUILD_LIMIT_S = 900


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        with open_engine() as engine:
            yield engine
    except NoEngine as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    """debian:bookworm-slim: what the engine has, what a registry gives, or what debootstrap makes."""
    image = "debian:bookworm-slim"
    if engine.run("image", "inspect", image, check=False).returncode == 0:
        return image
    if engine.run("pull", image, check=False, timeout_s=300).returncode == 0:
        return image
    script = Path(__file__).with_name("base_image.sh")
    done = subprocess.run([script], env=engine.variables(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no registry gives {image}, and it cannot be made here: {done.stderr.strip()}")
    return image


@pytest.fixture(scope="session")
def model_repository() -> Path:
    repository = ROOT / "model_repository"
    if not (repository / "minilm" / "1" / "model.onnx").is_file():
        pytest.skip("model_repository/ has no weights: run make models first")
    return repository


@pytest.fixture(scope="session")
def cpu_image(
    engine: Engine, base_image: str, tmp_path_factory: pytest.TempPathFactory, capfd_disabled: None
) -> str:
    """Built from docker/ by its own script, as a user's is, with what model_repository/ declares."""
    context = tmp_path_factory.mktemp("image") / "docker"
    shutil.copytree(ROOT / "docker", context, ignore=shutil.ignore_patterns("secrets", ".env"))
    for name, content in context_files(ROOT / "model_repository").items():
        (context / name).write_bytes(content)
    started_s = time.monotonic()
    done = subprocess.run(
        [context / "build.sh", "cpu"],
        env=engine.variables(),
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(f"\ntritonsmith-cpu was built from {base_image} in {time.monotonic() - started_s:.0f} s")
    return "tritonsmith-cpu"


@pytest.fixture(scope="session")
def capfd_disabled(pytestconfig: pytest.Config) -> Iterator[None]:
    """Output of a session's fixtures goes to the terminal."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        yield
