"""The flags of production: which release gets which, and that nothing leaves an operator's doors open."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritonsmith.deploy.flags import server_flags
from tritonsmith.errors import DeployError
from tritonsmith.server.environment import ServerEnvironment

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def names_of(flags: tuple[str, ...]) -> set[str]:
    return {flag.split("=", 1)[0] for flag in flags}


def test_model_control_and_completion_are_off() -> None:
    flags = server_flags()
    assert {"--model-control-mode=none", "--disable-auto-complete-config"} <= set(flags)
    assert "--trace-config=level=OFF" in flags


@pytest.mark.parametrize("flag", ["--http-restricted-api", "--grpc-restricted-protocol"])
def test_operators_endpoints_ask_for_a_key(flag: str) -> None:
    rule = next(line for line in server_flags() if line.startswith(f"{flag}="))
    endpoints, _, key = rule.removeprefix(f"{flag}=").partition(":")
    assert set(endpoints.split(",")) == {"shared-memory", "model-repository", "trace", "logging"}
    assert key == "tritonsmith-admin-key=@ADMIN_KEY@"


@pytest.mark.parametrize(
    ("triton", "gained"),
    [
        ("2.51.0", set()),
        ("2.56.9", set()),
        ("2.57.0", {"--grpc-max-response-pool-size"}),
        ("2.59.0", {"--grpc-max-response-pool-size", "--http-max-input-size"}),
        ("2.68.0", {"--grpc-max-response-pool-size", "--http-max-input-size", "--allow-client-shm"}),
        ("2.71", {"--grpc-max-response-pool-size", "--http-max-input-size", "--allow-client-shm"}),
    ],
)
def test_a_release_gets_the_flags_that_it_knows(triton: str, gained: set[str]) -> None:
    oldest = names_of(server_flags())
    assert names_of(server_flags(triton)) - oldest == gained


def test_histograms_come_with_2_53() -> None:
    histograms = "--metrics-config=histogram_latencies=true"
    assert histograms not in server_flags("2.52.0")
    assert histograms in server_flags("2.53.0")


def test_shared_memory_of_clients_is_off_where_it_can_be() -> None:
    assert "--allow-client-shm=false" in server_flags("2.68.0")


def test_a_role_reaches_its_flag() -> None:
    assert "--allow-gpu-metrics=true" in server_flags("2.71.0", "gpu")
    assert "--allow-gpu-metrics=false" in server_flags("2.71.0", "cpu")


@pytest.mark.parametrize("version", ["26.07", "3.0.0", "2", ""])
def test_an_unknown_version_is_refused(version: str) -> None:
    with pytest.raises(DeployError, match="no such version of Triton"):
        server_flags(version)


def test_an_image_writes_its_flags_with_a_bare_python() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tritonsmith.deploy.flags", "--triton", "2.71.0", "--role", "gpu"],
        env={"PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(done.stdout.splitlines()) == server_flags("2.71.0", "gpu")


def start_with(environment: ServerEnvironment, flags: tuple[str, ...], repository: Path) -> str:
    """What tritonserver says to `flags`, and to a repository that is missing."""
    places = (f"--cache-directory={environment.caches}", f"--model-repository={repository}")
    done = subprocess.run(
        [str(environment.tritonserver), *places, *flags],
        env={"LD_LIBRARY_PATH": str(environment.library_folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_the_embedded_release_knows_every_flag(server_environment: ServerEnvironment, tmp_path: Path) -> None:
    """Triton reads all flags before it looks for models; one that it lacks ends it sooner."""
    missing = tmp_path / "none"
    said = start_with(server_environment, server_flags(), missing)
    assert f"failed to stat file {missing}" in said
    said = start_with(server_environment, server_flags("2.57.0"), missing)
    assert "unrecognized option '--grpc-max-response-pool-size" in said


def test_of_a_flag_that_is_given_twice_the_later_one_holds(
    server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """entrypoint.sh, Compose and Kubernetes change flags of the image by what they add."""
    twice = ("--rate-limit=off", "--rate-limit=execution_count")
    said = start_with(server_environment, (*server_flags(), *twice), tmp_path / "none")
    assert re.search(r"rate_limit +\| EXEC_COUNT ", said)
    said = start_with(server_environment, (*server_flags(), *reversed(twice)), tmp_path / "none")
    assert re.search(r"rate_limit +\| OFF ", said)
