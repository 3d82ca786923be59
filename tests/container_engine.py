"""A container engine for tests: the one that is here, else one of their own for as long as they run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_S = 60.0
_STOP_S = 60.0


class NoEngine(Exception):  # noqa: N818 - a reason to skip, no error
    """Why there is no engine here; the reason of the skip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A client and the address of a daemon that answers it."""

    client: str
    host: str  # "": the client's default

    def variables(self) -> dict[str, str]:
        """What programs that talk to the engine need: docker, docker-compose, docker/build.sh."""
        return {**os.environ, "DOCKER": self.client, **({"DOCKER_HOST": self.host} if self.host else {})}

    def run(
        self, *arguments: str, check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """`docker <arguments>`; with `check`, a failure is an AssertionError that quotes it."""
        done = subprocess.run(
            [self.client, *arguments],
            env=self.variables(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done


@contextmanager
def open_engine() -> Iterator[Engine]:
    """DOCKER_HOST's or the default engine where it answers, else a private dockerd. Raises NoEngine."""
    client = _client()
    host = os.environ.get("DOCKER_HOST", "")
    if _answers(client, host):
        yield Engine(client=client, host=host)
        return
    if host:
        raise NoEngine(f"no container engine answers at DOCKER_HOST={host}")
    with _private_engine(client) as engine:
        yield engine


def _client() -> str:
    """A docker that builds with BuildKit: newer ones ask for a plugin that may not be installed."""
    named = os.environ.get("DOCKER")
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/bin"]
    found = (
        [named] if named else [f"{folder}/docker" for folder in folders if shutil.which(f"{folder}/docker")]
    )
    for client in dict.fromkeys(found):
        if _succeeds([client, "build", "--help"], {"DOCKER_BUILDKIT": "1"}):
            return client
    raise NoEngine("no docker client with BuildKit is here (on Debian: apt-get install docker.io)")


def _answers(client: str, host: str) -> bool:
    return _succeeds([client, "version"], {"DOCKER_HOST": host} if host else {})


def _succeeds(command: list[str], variables: Mapping[str, str]) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, timeout=30, check=False
        )
        return done.returncode == 0
    return False


@contextmanager
def _private_engine(client: str) -> Iterator[Engine]:
    """dockerd with all that it has below one short path (a socket's may have 107 bytes); gone at the end."""
    dockerd = shutil.which("dockerd") or shutil.which("/usr/sbin/dockerd")
    if dockerd is None or os.geteuid() != 0:
        raise NoEngine("no container engine answers, and one can be started only by root with dockerd")
    folder = Path(tempfile.mkdtemp(prefix="tritonsmith-engine-"))
    host = f"unix://{folder}/docker.sock"
    command = [dockerd, f"--data-root={folder}/data", f"--exec-root={folder}/exec", "-H", host]
    try:
        with (folder / "log").open("wb") as log:
            daemon = subprocess.Popen(
                [*command, f"--pidfile={folder}/dockerd.pid"], stdout=log, stderr=log, start_new_session=True
            )
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(client, host):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise NoEngine(f"dockerd does not start here: {_last_line(folder / 'log')}")
                time.sleep(0.2)
            yield Engine(client=client, host=host)
        finally:
            daemon.terminate()
            try:
                daemon.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it says nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A started container; ports are the host's, on 127.0.0.1."""

    engine: Engine
    name: str

    def port(self, inside: int) -> int:
        return int(self.engine.run("port", self.name, f"{inside}/tcp").stdout.rsplit(":", 1)[1])

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.port(8000)}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.port(8001)}"

    def state(self, field: str) -> str:
        """`field` of docker inspect's State: `Status`, `ExitCode`, `Health.Status`."""
        return self.engine.run("inspect", "--format", f"{{{{.State.{field}}}}}", self.name).stdout.strip()

    def log(self) -> str:
        done = self.engine.run("logs", self.name)
        return done.stdout + done.stderr

    def execute(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.engine.run("exec", self.name, *command, check=check)

    def stop(self) -> float:
        """`docker stop`; how long it took, in seconds."""
        started_s = time.monotonic()
        self.engine.run("stop", "--time", "60", self.name)
        return time.monotonic() - started_s

    def wait_until_healthy(self, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while (health := self.state("Health.Status")) != "healthy":
            if self.state("Status") == "exited" or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is {health}:\n{self.log()}")
            time.sleep(0.5)


@contextmanager
def started(engine: Engine, name: str, *arguments: str) -> Iterator[Container]:
    """`docker run --detach --name <name> <arguments>`; removed at the end, whatever became of it."""
    engine.run("rm", "--force", "--volumes", name, check=False)
    engine.run("run", "--detach", "--name", name, *arguments)
    try:
        yield Container(engine=engine, name=name)
    finally:
        engine.run("rm", "--force", "--volumes", name)
