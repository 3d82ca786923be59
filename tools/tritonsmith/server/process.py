"""Serving a repository on the embedded Triton.

with serve(Path("model_repository")) as server, Client(server.http_url) as client:
    client.model("digits")(pixels=images)["probabilities"]
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from tritonsmith.errors import RepositoryError, ServerError
from tritonsmith.server.environment import ServerEnvironment, ensure_environment, stage_requirements
from tritonsmith.server.launch import Launch, clear_stale_runs
from tritonsmith.server.log import relevant_lines
from tritonsmith.server.options import ServerOptions
from tritonsmith.server.ports import LOOPBACK, find_free_port, is_lost, port_error, refuse_used_port
from tritonsmith.server.proof import prove_inference
from tritonsmith.server.provision import CACHE_VARIABLE, cache_folder, silent
from tritonsmith.server.ready import describe_exit, wait_until_ready

_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A ready server. The addresses are those of this run; `pid` is tritonserver's."""

    repository: Path
    http_port: int
    grpc_port: int
    metrics_port: int
    environment: ServerEnvironment
    launch: Launch

    @property
    def http_url(self) -> str:
        return f"http://{self.http_address}"

    @property
    def http_address(self) -> str:
        """As tritonclient.http wants it."""
        return f"{LOOPBACK}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{LOOPBACK}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{LOOPBACK}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        return self.launch.pid

    def read_log(self) -> str:
        """Everything that the server and its models printed so far; also after the end."""
        return self.launch.read_log()

    def check(self) -> None:
        """Raise ServerError, with the lines of the log that matter, where the server has ended by itself."""
        code = self.launch.exit_code
        if code is not None and not self.launch.asked_to_end:
            raise ServerError(
                f"tritonserver ended while serving {self.repository} ({describe_exit(code)})",
                found=relevant_lines(self.read_log()),
            )

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the server ends by itself, which is a ServerError, or until `timeout_s` are over."""
        self.launch.wait(timeout_s)
        self.check()

    def stop(self) -> None:
        """Drain and stop, within the exit time-out; nothing of it is left. Stopping twice is fine."""
        self.launch.close()


@contextmanager
def serve(
    repository: Path | str,
    options: ServerOptions | None = None,
    *,
    say: Callable[[str], None] = silent,
) -> Iterator[Server]:
    """Serve `repository` on a real Triton on 127.0.0.1, ready when the block begins, gone when it ends.

    Ready means: every model loaded as the options ask, and one inference proved in this environment.
    Raises RepositoryError for a repository that is none, ProvisionError where the environment cannot be set
    up, and ServerError for a port in use, a model that Triton refuses (with its reason) and a server that
    ends by itself, also inside the block (where nothing else was raised there).
    """
    server = start(Path(repository), options or ServerOptions(), say=say)
    try:
        yield server
        server.check()
    finally:
        server.stop()


def start(repository: Path, options: ServerOptions, *, say: Callable[[str], None] = silent) -> Server:
    """As `serve`, for a caller that stops the server itself."""
    _check_repository(repository)
    _check_target(repository, options.target)
    for name, port in _ports(options).items():
        if port:
            refuse_used_port(port, name)
    environment = ensure_environment(stage_requirements(repository), say=say)
    clear_stale_runs()
    say(f"starting Triton on {repository}")
    for attempt in range(1, _TRIES + 1):
        chosen = _choose_ports(options)
        launch = Launch(
            environment,
            repository,
            _arguments(repository, chosen),
            http_port=chosen.http_port,
            exit_timeout_s=options.exit_timeout_s,
        )
        try:
            _make_ready(launch, environment, chosen)
        except BaseException as error:
            launch.kill()
            launch.close()
            lost = isinstance(error, ServerError) and _lost_port(launch.read_log(), chosen)
            if not lost:
                raise
            name, port = lost
            if _ports(options)[name] or attempt == _TRIES:
                raise port_error(port, name, "taken while the server was starting") from error
            continue
        return Server(
            repository=repository,
            http_port=chosen.http_port,
            grpc_port=chosen.grpc_port,
            metrics_port=chosen.metrics_port,
            environment=environment,
            launch=launch,
        )
    raise AssertionError("unreachable: the last attempt returns or raises")


def _make_ready(launch: Launch, environment: ServerEnvironment, options: ServerOptions) -> None:
    """Wait for the server and, at the same time, for the proof."""
    launch.pid  # noqa: B018 - raises where it could not be started at all
    over = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        proof: Future[None] = pool.submit(
            prove_inference, environment, timeout_s=options.ready_timeout_s, cancelled=over.is_set
        )
        try:
            wait_until_ready(
                launch,
                options.http_port,
                timeout_s=options.ready_timeout_s,
                cancelled=lambda: proof.done() and proof.exception() is not None,
            )
            proof.result()
        finally:
            over.set()


def serve_forever(
    repository: Path | str,
    options: ServerOptions | None = None,
    *,
    on_ready: Callable[[Server], None],
    say: Callable[[str], None] = silent,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return; `on_ready` is called once, with the server.

    Raises what `serve` raises; a server that ends by itself is a ServerError. For the main thread only.
    """
    asked = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()

    with serve(repository, options, say=say) as server:
        # Only now: while a server starts, and while it drains, a signal ends the wait as it always does.
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            on_ready(server)
            while not asked.wait(0.2):
                server.check()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        say("stopping: answering what is in flight")


def _check_repository(repository: Path) -> None:
    expected = "a folder with one folder a model, each with its config.pbtxt"
    if not repository.exists():
        raise RepositoryError(f"{repository} does not exist", expected=expected)
    if not repository.is_dir():
        raise RepositoryError(f"{repository} is not a folder", found="a file", expected=expected)
    if cache_folder().resolve().is_relative_to(repository.resolve()):
        raise RepositoryError(
            f"{repository} holds tritonsmith's cache, which Triton would read as a model",
            found=cache_folder(),
            fix=f"set {CACHE_VARIABLE} to a folder elsewhere",
        )


def _check_target(repository: Path, target: str | None) -> None:
    """Triton itself serves config.pbtxt of every model where a name is wrong."""
    known = sorted({path.stem for path in repository.glob("*/configs/*.pbtxt")})
    if target is not None and target not in known:
        raise RepositoryError(
            f"no model in {repository} has a target {target!r}",
            found=", ".join(known) or "no targets at all",
            expected=f"configs/{target}.pbtxt in some model's folder",
        )


def _ports(options: ServerOptions) -> dict[str, int]:
    return {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}


def _choose_ports(options: ServerOptions) -> ServerOptions:
    taken = {port for port in _ports(options).values() if port}
    chosen = {}
    for name, port in _ports(options).items():
        while not port or (port in taken and not _ports(options)[name]):
            port = find_free_port()
        taken.add(port)
        chosen[name] = port
    return replace(
        options, http_port=chosen["http"], grpc_port=chosen["grpc"], metrics_port=chosen["metrics"]
    )


def _arguments(repository: Path, options: ServerOptions) -> list[str]:
    arguments = [
        f"--http-address={LOOPBACK}",
        f"--grpc-address={LOOPBACK}",
        f"--metrics-address={LOOPBACK}",
        f"--http-port={options.http_port}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-port={options.metrics_port}",
        f"--model-control-mode={options.model_control}",
        *(f"--load-model={name}" for name in options.load_models),
    ]
    if options.target is not None:
        arguments.append(f"--model-config-name={options.target}")
    if options.model_control == "poll":
        arguments.append(f"--repository-poll-secs={options.poll_interval_s}")
    if not _is_given("--cache-config", options.flags):
        arguments.append(f"--cache-config=local,size={options.cache_bytes}")
    if not _is_given("--rate-limit", options.flags) and _uses_rate_limiter(repository):
        arguments.append("--rate-limit=execution_count")  # off by default: the configuration would do nothing
    return [*arguments, *options.flags]


def _is_given(name: str, flags: Sequence[str]) -> bool:
    return any(flag.split("=", 1)[0] == name for flag in flags)


def _uses_rate_limiter(repository: Path) -> bool:
    field = re.compile(r"^[^#\n]*\brate_limiter\b", re.MULTILINE)
    return any(
        field.search(path.read_text(encoding="utf-8", errors="replace"))
        for pattern in ("*/config.pbtxt", "*/configs/*.pbtxt")
        for path in repository.glob(pattern)
    )


def _lost_port(log: str, options: ServerOptions) -> tuple[str, int] | None:
    """The service whose port another process took between the check and the start."""
    return next(((name, port) for name, port in _ports(options).items() if is_lost(port, log)), None)
