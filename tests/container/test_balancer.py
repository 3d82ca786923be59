"""What `tritonsmith deploy compose` writes, started as by a user: replicas behind haproxy, and Prometheus.

haproxy and Prometheus are Debian's here; a registry's images take their places through the same variables.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from compose_stack import PROJECT, Stack, build_image, compose_command, free_ports
from container_engine import Engine
from open_loop import Outcome, send_at_rate
from tritonsmith.cli import main
from tritonsmith.deploy.measurements_file import (
    fingerprint_of_repository,
    read_measurements,
    write_measurements,
)

pytestmark = [pytest.mark.container, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BASE = "debian:bookworm-slim"
DEBIAN = """FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends {packages} && rm -rf /var/lib/apt/lists/*
{rest}
"""
PROMETHEUS = """RUN mkdir -p /etc/prometheus /prometheus && chown 65534:65534 /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]"""
COUNT, RATE_PER_S = 2000, 200.0
REPLICAS = ("triton", "triton-2")


@pytest.fixture(scope="module")
def stack(
    engine: Engine, cpu_image: str, model_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    if not compose_command():
        pytest.skip("no Compose is here (on Debian: apt-get install docker-compose)")
    folder = tmp_path_factory.mktemp("compose")
    build_image(engine, folder / "h", "compose-haproxy", DEBIAN.format(packages="haproxy", rest=""))
    packages = "prometheus wget"
    build_image(engine, folder / "p", "compose-prometheus", DEBIAN.format(packages=packages, rest=PROMETHEUS))
    repository = with_cached_model(model_repository, folder / "models")
    out = folder / "out"
    measured = measurements_of(model_repository, folder / "measured.json")
    arguments = ["deploy", "compose", str(model_repository), "--out", str(out)]
    assert main([*arguments, "--measurements", str(measured)]) == 0
    ports = ("TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT", "BALANCER_HTTP_PORT")
    variables = {
        "COMPOSE_PROJECT_NAME": PROJECT,
        "COMPOSE_FILE": "compose.cpu.yaml",
        "COMPOSE": " ".join(compose_command()),
        "HAPROXY_IMAGE": "compose-haproxy",
        "PROMETHEUS_IMAGE": "compose-prometheus",
        "TRITON_CPU_IMAGE": cpu_image,
        "MODEL_REPOSITORY": str(repository),
        **free_ports((*ports, "BALANCER_GRPC_PORT", "PROMETHEUS_PORT")),
    }
    stack = Stack(engine=engine, folder=out, variables=variables)
    stack.script("make_secrets.sh")
    try:
        stack.compose("up", "--detach", "balancer", "prometheus")
        stack.wait_until_healthy(*REPLICAS, "balancer", "prometheus")
        yield stack
    finally:
        stack.compose("down", "--volumes", check=False)
        engine.run("rmi", "compose-haproxy", "compose-prometheus", check=False)
        shutil.rmtree(repository)


def measurements_of(repository: Path, path: Path) -> Path:
    """docker/measurements.json, for the weights that were built here: machines choose other precisions."""
    measurements = read_measurements(ROOT / "docker" / "measurements.json")
    fingerprint = fingerprint_of_repository(repository, measurements.target)
    write_measurements(path, replace(measurements, fingerprint=fingerprint))
    return path


def with_cached_model(source: Path, repository: Path) -> Path:
    """A copy with one more model, digits_cached, that asks for the response cache."""
    shutil.copytree(source, repository, ignore=shutil.ignore_patterns("__pycache__"))
    cached = repository / "digits_cached"
    shutil.copytree(repository / "digits", cached)
    config = cached / "config.pbtxt"
    text = config.read_text().replace('name: "digits"', 'name: "digits_cached"')
    config.write_text(text + "response_cache { enable: true }\n")
    return repository


@pytest.fixture(autouse=True)
def both_replicas(stack: Stack) -> None:
    """Each test begins with two replicas that take requests."""
    stack.compose("up", "--detach", *REPLICAS)
    stack.wait_until_healthy(*REPLICAS)
    stack.wait_until_balanced()


def requests_while(stack: Stack, midway: object, name: str) -> Outcome:
    assert callable(midway)
    outcome = send_at_rate(stack.url("BALANCER_GRPC_PORT"), count=COUNT, rate_per_s=RATE_PER_S, midway=midway)
    print(f"\n{name}: {outcome}")
    return outcome


def test_drain_and_stop_loses_nothing(stack: Stack) -> None:
    outcome = requests_while(stack, lambda: stack.script("drain.sh", "triton-2"), "drain, then stop")
    assert stack.inspect("triton-2", "{{.State.Status}} {{.State.ExitCode}}") == "exited 0"
    assert (outcome.answered, dict(outcome.lost)) == (COUNT, {})


def test_crash_loses_nothing(stack: Stack) -> None:
    container = stack.container("triton-2")
    outcome = requests_while(stack, lambda: stack.engine.run("kill", "-s", "KILL", container), "SIGKILL")
    assert stack.inspect("triton-2", "{{.State.ExitCode}}") == "137"
    assert (outcome.answered, dict(outcome.lost)) == (COUNT, {})


def test_stop_without_drain_loses_requests(stack: Stack) -> None:
    """The negative control: were nothing lost here, the tests above would show nothing."""
    outcome = requests_while(stack, lambda: stack.compose("stop", "triton-2"), "SIGTERM without drain")
    assert sum(outcome.lost.values()) > 0
    assert set(outcome.lost) <= {"StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE"}


def test_stopped_replica_is_taken_back(stack: Stack) -> None:
    """Even at another address: a placeholder takes the old one in between."""
    address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    before = stack.inspect("triton-2", address)
    stack.script("drain.sh", "triton-2")
    stack.compose("rm", "--force", "triton-2")
    placeholder = f"{PROJECT}-placeholder"
    network = ("--network", f"{PROJECT}_default")
    stack.engine.run("run", "-d", "--rm", "--name", placeholder, *network, BASE, "sleep", "120")
    try:
        stack.compose("up", "--detach", "triton-2")
        stack.wait_until_healthy("triton-2")
        stack.wait_until_balanced()
        assert stack.inspect("triton-2", address) != before
    finally:
        stack.engine.run("kill", placeholder)


def test_drain_of_an_unknown_replica_is_refused(stack: Stack) -> None:
    done = stack.compose("ps", "-q")
    with pytest.raises(AssertionError, match=r"No such server|triton-9"):
        stack.script("drain.sh", "triton-9")
    assert stack.compose("ps", "-q").stdout == done.stdout


@pytest.mark.parametrize("service", ["triton", "triton-2", "balancer", "prometheus"])
def test_containers_are_hardened(stack: Stack, service: str) -> None:
    form = (
        "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}} {{.Config.User}}"
    )
    readonly, dropped, security, user = stack.inspect(service, form).split()
    assert (readonly, dropped, security) == ("true", "[ALL]", "[no-new-privileges:true]")
    assert not user.startswith(("0", "root"))
    published = json.loads(stack.inspect(service, "{{json .HostConfig.PortBindings}}")) or {}
    hosts = {binding["HostIp"] for bindings in published.values() for binding in bindings}
    assert hosts <= {"127.0.0.1"}


def expressions() -> list[tuple[str, str]]:
    """Title and PromQL of every panel, with Grafana's variables filled in."""
    board = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "triton.json").read_text())
    values = {"$__rate_interval": "30s", "$model": ".*", "$instance": ".*"}
    found = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for name, value in values.items():
                text = text.replace(name, value)
            found.append((panel["title"], text))
    return found


def test_every_panel_shows_data_under_load(stack: Stack) -> None:
    """Panels of GPUs are empty on a machine without one; their expressions are parsed all the same."""
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(ask_for, stack.url("BALANCER_GRPC_PORT"), 25.0) for _ in range(4)]:
            future.result()
    empty, wrong = [], []
    for title, expression in expressions():
        values = [float(row["value"][1]) for row in stack.query(expression)]
        if not values:
            empty.append(title)
        elif not any(math.isfinite(value) for value in values):
            wrong.append((title, values))
    assert set(empty) == {"GPU utilisation", "GPU memory"}
    assert wrong == []
    replicas = {row["metric"]["instance"] for row in stack.query('up{job="triton"} == 1')}
    assert replicas == set(REPLICAS)
    hits = stack.query('sum(rate(nv_cache_num_hits_per_model{model="digits_cached"}[30s]))')
    assert float(hits[0]["value"][1]) > 0
    assert float(stack.query("sum(rate(nv_inference_request_failure[30s]))")[0]["value"][1]) > 0


def ask_for(url: str, seconds: float) -> None:
    """Good requests to three models, one of them with a cache, and some that an ensemble refuses."""
    pixels = triton.InferInput("pixels", [4, 8, 8, 1], "FP32")
    pixels.set_data_from_numpy(np.zeros((4, 8, 8, 1), np.float32))
    text = triton.InferInput("text", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"a sentence"]], object))
    broken = triton.InferInput("image", [1, 1], "BYTES")
    broken.set_data_from_numpy(np.array([[b"no image"]], object))
    end = time.monotonic() + seconds
    with triton.InferenceServerClient(url) as client:
        while time.monotonic() < end:
            client.infer("digits", [pixels])
            client.infer("digits_cached", [pixels])
            client.infer("minilm_text", [text])
            with pytest.raises(InferenceServerException):
                client.infer("digits_image", [broken])
