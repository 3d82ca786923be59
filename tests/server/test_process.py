"""The embedded server as a process: every test runs a real Triton."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from python_models import ask, processes_under, runs, segments, still_running, write_model
from tritonsmith.errors import ProvisionError, RepositoryError, ServerError, UsageError
from tritonsmith.server import ServerOptions, serve
from tritonsmith.server.environment import ServerEnvironment, cache_folder
from tritonsmith.server.log import find_refusals, relevant_lines
from tritonsmith.server.ports import ask_http, find_free_port
from tritonsmith.server.proof import prove_inference

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 as /proc/net/tcp and tcp6 have it
ANY_PORT = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)

pytestmark = pytest.mark.usefixtures("server_environment", "own_cache")

# Serves argv[1] as the command does, with argv[2] as exit time-out, and prints port and pid.
COMMAND = """
import sys
from tritonsmith.server import ServerOptions, serve_forever
options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0, exit_timeout_s=float(sys.argv[2]))
serve_forever(sys.argv[1], options, on_ready=lambda server: print(server.http_port, server.pid, flush=True))
"""


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the environments of the real one and no runs but the test's own."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("environments", "wheels"):
        (cache / name).symlink_to(cache_folder() / name)
    monkeypatch.setenv("TRITONSMITH_CACHE", str(cache))
    return cache


@contextmanager
def serving_process(repository: Path, exit_timeout_s: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process of its own that serves; with the HTTP port."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(repository), str(exit_timeout_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port, _ = map(int, process.stdout.readline().split())
        yield process, port
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_serves_on_loopback_and_leaves_nothing(tmp_path: Path) -> None:
    repository = write_model(tmp_path / "repository", "double", config="response_cache { enable: true }")
    write_model(tmp_path / "other", "treble")
    files = sorted(repository.rglob("*"))
    with serve(repository, ANY_PORT) as server, serve(tmp_path / "other", ANY_PORT) as other:
        assert [ask(server.http_port, "double", 1.5) for _ in range(3)] == [3.0, 3.0, 3.0]
        assert ask(other.http_port, "treble", 2.0) == 4.0
        assert ask_http(server.http_port, "POST", "/v2/repository/index", {}) == (
            200,
            '[{"name":"double","version":"1","state":"READY"}]',
        )
        assert server.http_url == f"http://127.0.0.1:{server.http_port}"
        assert server.metrics_url == f"http://127.0.0.1:{server.metrics_port}/metrics"
        _, metrics = ask_http(server.metrics_port, "GET", "/metrics")
        assert 'nv_cache_num_hits_per_model{model="double",version="1"} 2' in metrics
        socket.create_connection(("127.0.0.1", int(server.grpc_url.split(":")[1]))).close()
        for port in (server.http_port, server.grpc_port, server.metrics_port):
            assert listening_addresses(port) <= LOOPBACK
        pids = processes_under(server.pid) | processes_under(other.pid)
        assert len(pids) >= 4  # two servers with a stub each
        here = runs()
        assert len(here) == 2
        assert len(segments(here)) >= 2
    assert not still_running(pids)
    assert not runs()
    assert not segments(here)
    assert sorted(repository.rglob("*")) == files  # no .pyc either


def listening_addresses(port: int) -> set[str]:
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [row.split() for row in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    local = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


def test_a_used_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "double")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        before = time.monotonic()
        with (
            pytest.raises(ServerError, match=rf"port {port}, wanted for grpc") as caught,
            serve(repository, replace(ANY_PORT, grpc_port=port)),
        ):
            pass
        assert time.monotonic() - before < 1.0
    assert str(os.getpid()) in str(caught.value)  # who holds it
    assert "--grpc-port" in str(caught.value)


def test_a_refused_model_is_told_with_tritons_reason(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "fine")
    write_model(repository, "needy", initialize="import nosuchpackage")
    write_model(repository, "odd", config="no_such_field: 3")
    with pytest.raises(ServerError, match="Triton refuses the models") as caught, serve(repository, ANY_PORT):
        pass
    message = str(caught.value)
    assert "needy: Internal: ModuleNotFoundError: No module named 'nosuchpackage'" in message
    assert 'no field named "no_such_field"' in message
    assert str(repository / "needy" / "1" / "model.py") in message  # the user's path, not a link to it
    assert "needy/requirements.txt" in message
    assert "fine" not in message
    assert not runs()


def test_a_server_that_dies_while_starting_is_told(tmp_path: Path) -> None:
    crash = "print('last words', flush=True); os.kill(os.getppid(), signal.SIGABRT); time.sleep(30)"
    repository = write_model(tmp_path, "crash", initialize=crash)
    with (
        pytest.raises(ServerError, match=r"ended while starting \(signal 6\)") as caught,
        serve(repository, ANY_PORT),
    ):
        pass
    assert "last words" in str(caught.value)
    assert "PINNED" not in str(caught.value).upper()  # the noise of a machine without a GPU


def test_a_crash_while_serving_is_noticed_and_cleared(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "double")
    with serve(repository, ANY_PORT) as server:
        pids = processes_under(server.pid)
        here = runs()
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match=r"ended while serving .* \(signal 9\)"):
            server.wait(20)
        server.stop()
    assert not still_running(pids)  # its stub too
    assert not runs()
    assert not segments(here)


def test_sigterm_answers_what_is_in_flight_under_an_idle_connection(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "slow", answer="time.sleep(float(x[0]))")
    with serving_process(repository, exit_timeout_s=60) as (process, port), ThreadPoolExecutor() as pool:
        ask(port, "slow", 0.0)
        idle = http.client.HTTPConnection("127.0.0.1", port)
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        unused = socket.create_connection(("127.0.0.1", port))
        answer = pool.submit(ask, port, "slow", 2.0)
        time.sleep(0.7)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert answer.result() == 4.0
        assert process.wait(30) == 0
        assert time.monotonic() - asked < 15  # Triton alone would wait 60 s for the idle connections
        idle.close()
        unused.close()
    assert not runs()


def test_the_exit_time_out_bounds_the_wait(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "slow", answer="time.sleep(float(x[0]))")
    options = replace(ANY_PORT, exit_timeout_s=2)
    with serve(repository, options) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(ask, server.http_port, "slow", 40.0, 60.0)
        time.sleep(0.5)
        pids = processes_under(server.pid)
        asked = time.monotonic()
        server.stop()
        assert time.monotonic() - asked < 6
        assert isinstance(answer.exception(), OSError)
    assert not still_running(pids)
    assert not runs()


def test_kill_of_the_parent_leaves_nothing(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "double")
    with serving_process(repository, exit_timeout_s=10) as (process, port):
        ask(port, "double", 1.0)
        pids = processes_under(process.pid)
        assert len(pids) == 4  # the parent, the supervisor, the server, the stub
        here = runs()
        assert segments(here)
        process.kill()
        process.wait()
        assert wait_for(lambda: not still_running(pids))
        assert wait_for(lambda: not runs() and not segments(here))


def test_kill_of_the_supervisor_ends_the_server(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "double")
    with serve(repository, replace(ANY_PORT, exit_timeout_s=10)) as server:
        pids = processes_under(server.pid)
        here = runs()
        supervisor = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(supervisor, signal.SIGKILL)
        with pytest.raises(ServerError, match="ended while serving"):
            server.wait(20)
        server.stop()
    assert wait_for(lambda: not still_running(pids))
    assert not runs()
    assert not segments(here)


def test_paths_with_spaces_and_letters_beyond_ascii(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cäche of mine"
    cache.symlink_to(own_cache)
    monkeypatch.setenv("TRITONSMITH_CACHE", str(cache))
    reads = "print('read', open(args['model_repository'] + '/text').read(), flush=True)"
    repository = write_model(tmp_path / "répertoire à moi", "reader", initialize=reads)
    (repository / "reader" / "text").write_text("grün", encoding="utf-8")
    with serve(repository, ANY_PORT) as server:
        assert ask(server.http_port, "reader", 4.0) == 8.0
        assert "read grün" in server.read_log()


def test_model_control(tmp_path: Path) -> None:
    repository = write_model(tmp_path / "explicit", "first")
    write_model(repository, "second")
    options = replace(ANY_PORT, model_control="explicit", load_models=("first",))
    with serve(repository, options) as server:
        assert ask(server.http_port, "first", 1.0) == 2.0
        assert ask_http(server.http_port, "GET", "/v2/models/second/ready")[0] == 400
        assert ask_http(server.http_port, "POST", "/v2/repository/models/second/load", {})[0] == 200
        assert ask(server.http_port, "second", 1.0) == 2.0


def test_polling_finds_a_model_that_is_published_later(tmp_path: Path) -> None:
    repository = write_model(tmp_path / "poll", "first")
    staged = write_model(tmp_path / "staged", "second")
    with serve(repository, replace(ANY_PORT, model_control="poll", poll_interval_s=1)) as server:
        (staged / "second").rename(repository / "second")
        ready = "/v2/models/second/ready"
        assert wait_for(lambda: ask_http(server.http_port, "GET", ready)[0] == 200)


def test_the_rate_limiter_of_a_configuration_is_switched_on(tmp_path: Path) -> None:
    group = 'instance_group [{ count: 1 kind: KIND_CPU rate_limiter { resources [{ name: "R" count: 1 }] } }]'
    repository = write_model(tmp_path, "limited", config=group)
    with serve(repository, ANY_PORT) as server:
        assert "EXEC_COUNT" in server.read_log()
        assert ask(server.http_port, "limited", 1.0) == 2.0


def test_the_proof_catches_numpy_2(tmp_path: Path, server_environment: ServerEnvironment) -> None:
    """The negative control: numpy 2, with which the same server answers 200 and nothing in it."""
    folder = tmp_path / "broken"
    python = server_environment.python
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True, capture_output=True)
    packages = next(folder.glob("lib/python3.*/site-packages"))
    pip = [python, "-m", "pip", "install", "--quiet", "--target", packages, "numpy==2.2.6"]
    subprocess.run(pip, check=True, capture_output=True)
    start = next(server_environment.folder.glob("lib/python3.*/site-packages/tritonsmith_start.pth"))
    (packages / start.name).write_text(start.read_text())
    prove_inference(server_environment)
    with pytest.raises(ServerError, match="does not compute what it should"):
        prove_inference(replace(server_environment, folder=folder))


def test_a_stage_gets_the_packages_that_it_names(tmp_path: Path) -> None:
    imports = "import iniconfig, numpy; print(numpy.__version__, flush=True)"
    repository = write_model(tmp_path, "stage", initialize=imports)
    (repository / "stage" / "requirements.txt").write_text("iniconfig==2.1.0\n")
    with serve(repository, ANY_PORT) as server:
        assert ask(server.http_port, "stage", 1.0) == 2.0
        assert "1.26.4" in server.read_log()
    (repository / "stage" / "requirements.txt").write_text("numpy>=2\n")
    with pytest.raises(ProvisionError, match="numpy") as caught, serve(repository, ANY_PORT):
        pass
    assert "requirements.txt" in str(caught.value)


def test_a_server_can_be_stopped_from_another_thread(tmp_path: Path) -> None:
    repository = write_model(tmp_path, "double")
    with serve(repository, ANY_PORT) as server:
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        stopper.join()
        server.stop()  # twice is fine
        server.check()  # an end that was asked for is no failure


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_repository_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "repository"
    if kind == "file":
        path.write_text("")
    with pytest.raises(RepositoryError, match=r"does not exist|is not a folder"), serve(path, ANY_PORT):
        pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"http_port": 70000}, "http port"),
        ({"http_port": 9000, "grpc_port": 9000}, "share a port"),
        ({"load_models": ("m",)}, "explicit"),
        ({"exit_timeout_s": 0.0}, "above 0"),
        ({"flags": ("--http-address=0.0.0.0",)}, "127.0.0.1 alone"),
        ({"flags": ("--model-config-name=gpu",), "target": "cpu"}, "say the same"),
    ],
)
def test_options_are_checked(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServerOptions(**wrong)  # type: ignore[arg-type]


def test_a_cache_inside_of_the_repository_is_refused(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.rename(tmp_path / "cache")
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RepositoryError, match="holds tritonsmith's cache"), serve(tmp_path, ANY_PORT):
        pass  # Triton would follow the run folder's link to the repository for ever


def test_find_free_port_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", find_free_port()))


def test_a_log_is_read_without_its_tables() -> None:
    log = textwrap.dedent(
        """\
        I1122 15:42:27.646018 11262 model_lifecycle.cc:472] "loading: m:1"
        E1122 15:42:27.643662 11262 server.cc:241] "CudaDriverHelper has not been initialized."
        E1122 15:42:28.1 11262 model.cc:642] "failed to load 'm' version 1: Internal: no\\n\\nAt:\\n  x(1)"
        I1122 15:42:29.130930 11262 server.cc:674]
        +-------+---------+------------------------+
        | Model | Version | Status                 |
        +-------+---------+------------------------+
        | m     | 1       | UNAVAILABLE: Internal: no

        At:
          x(1) |
        +-------+---------+------------------------+

        said by a model
        error: creating server: Internal - failed to load all models
        """
    )
    assert [(found.model, found.reason) for found in find_refusals(log)] == [
        ("m", "Internal: no\n\nAt:\n  x(1)")
    ]
    assert relevant_lines(log).split("\n    ") == [
        "failed to load 'm' version 1: Internal: no",
        "At:",
        "  x(1)",
        "said by a model",
        "error: creating server: Internal - failed to load all models",
    ]
