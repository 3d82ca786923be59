"""`docker-compose up` of a rendered folder, and what there is to ask of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from container_engine import Engine

PROJECT = "compose-test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A project of Compose. Its ports are those of `variables`."""

    engine: Engine
    folder: Path
    variables: Mapping[str, str]

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run([*compose_command(), "--profile", "balanced", *arguments], check=check)

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One of the folder's own scripts, as a user calls it."""
        return self._run([str(self.folder / name), *arguments], check=True)

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service).stdout.strip()

    def url(self, variable: str) -> str:
        return f"127.0.0.1:{self.variables[variable]}"

    def wait_until_healthy(self, *services: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        for service in services:
            while (health := self.inspect(service, "{{.State.Health.Status}}")) != "healthy":
                log = "" if time.monotonic() < deadline else self.compose("logs", service).stdout[-3000:]
                assert not log, f"{service} is {health}:\n{log}"
                time.sleep(0.5)

    def inspect(self, service: str, form: str) -> str:
        return self.engine.run("inspect", "--format", form, self.container(service)).stdout.strip()

    def server_states(self) -> dict[str, str]:
        """Of haproxy's servers for gRPC: name -> UP, DOWN, DRAIN, ..."""
        ask = "exec 3<>/dev/tcp/127.0.0.1/9999; echo show stat >&3; cat <&3"
        rows = self.compose("exec", "-T", "balancer", "bash", "-c", ask).stdout.splitlines()
        columns = rows[0].removeprefix("# ").split(",")
        found = [dict(zip(columns, row.split(","), strict=False)) for row in rows[1:]]
        return {
            row["svname"]: row["status"]
            for row in found
            if row.get("pxname") == "triton_grpc" and row["svname"] != "BACKEND"
        }

    def wait_until_balanced(self, timeout_s: float = 60) -> None:
        """Every replica takes requests."""
        deadline = time.monotonic() + timeout_s
        while set((states := self.server_states()).values()) != {"UP"}:
            assert time.monotonic() < deadline, states
            time.sleep(0.5)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers to a PromQL expression now."""
        text = urllib.parse.urlencode({"query": expression})
        address = f"http://{self.url('PROMETHEUS_PORT')}/api/v1/query?{text}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def _run(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.engine.variables(), **self.variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done


def compose_command() -> list[str]:
    """Compose 1.29's program where it is installed, else Compose 2's plugin; empty where there is neither."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    docker = shutil.which("docker") or "docker"
    done = subprocess.run([docker, "compose", "version"], capture_output=True, check=False)
    return [docker, "compose"] if done.returncode == 0 else []


def free_ports(names: tuple[str, ...]) -> dict[str, str]:
    """A free port of the loopback for each name; all are held until the last is found."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    try:
        return {name: str(held.getsockname()[1]) for name, held in zip(names, sockets, strict=True)}
    finally:
        for held in sockets:
            held.close()


def build_image(engine: Engine, folder: Path, tag: str, dockerfile: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile)
    done = subprocess.run(
        [engine.client, "build", "--network=host", "--tag", tag, str(folder)],
        env={**os.environ, **engine.variables(), "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
