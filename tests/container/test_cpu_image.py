"""The CPU image, started as production starts it: what it serves, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from container_engine import Container, Engine, started
from tritonsmith import __version__
from tritonsmith.client import Client
from tritonsmith.deploy.context import PINS
from tritonsmith.deploy.measurements_file import read_measurements
from tritonsmith.deploy.sizes import MIB, memory_bytes_for, shm_bytes_for
from tritonsmith.validate import validate

pytestmark = [pytest.mark.container, pytest.mark.timeout(1200)]

DOCKER = Path(__file__).resolve().parents[2] / "docker"
MEASURED = read_measurements(DOCKER / "measurements.json")
KEY = "a-key-of-the-tests-0123456789"
HARDENED = (
    "--read-only",
    "--tmpfs=/tmp:rw,nosuid,nodev,noexec,size=16m",
    f"--shm-size={shm_bytes_for(MEASURED) // MIB}m",
    f"--memory={memory_bytes_for(MEASURED)}",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--pids-limit=1024",
    "--publish=127.0.0.1::8000",
    "--publish=127.0.0.1::8001",
    "--publish=127.0.0.1::8002",
)
SOON = "--health-interval=1s"
SENTENCES = np.array([["A short sentence."], ["Der Übergang über die Brücke"], ["Triton serves models."]])


@pytest.fixture(scope="module")
def served(
    engine: Engine, cpu_image: str, model_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """model_repository/ under uid 10001, with a key for an operator."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(f"{KEY}\n")
    key.chmod(0o644)
    mounts = (f"--volume={model_repository}:/models:ro", f"--volume={key}:/run/secrets/key:ro")
    variables = ("--env=TRITONSMITH_ADMIN_KEY_FILE=/run/secrets/key",)
    with started(engine, "tritonsmith-cpu-served", *HARDENED, *mounts, *variables, cpu_image) as container:
        container.wait_until_healthy()
        yield container


@pytest.fixture
def digits_alone(model_repository: Path, tmp_path: Path) -> Path:
    repository = tmp_path / "models"
    shutil.copytree(model_repository / "digits", repository / "digits")
    for path in (tmp_path, repository):
        path.chmod(0o755)
    return repository


def ended(engine: Engine, image: str, *arguments: str) -> tuple[int, str]:
    """The exit code and the log of a container that is expected to end by itself."""
    with started(engine, "tritonsmith-cpu-ended", *arguments, image) as container:
        code = engine.run("wait", container.name, timeout_s=60).stdout
        return int(code), container.log()


def ask(container: Container, method: str, path: str, key: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", container.port(8000), timeout=10)
    headers = {"Connection": "close", **({"tritonsmith-admin-key": key} if key else {})}
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


# --- the image ----------------------------------------------------------------------------------------


def test_image_is_small_and_says_what_it_is(engine: Engine, cpu_image: str) -> None:
    image = json.loads(engine.run("image", "inspect", cpu_image).stdout)[0]
    assert image["Size"] < 800e6
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["StopSignal"] == "SIGTERM"
    labels = image["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "tritonsmith-cpu"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_image_holds_no_tool_that_serving_does_not_need(served: Container) -> None:
    script = (
        "for tool in gcc pip pip3 curl wget; do ! command -v $tool || exit 3; done; "
        "python3 -c 'import pip' 2>/dev/null && exit 4; "
        "find / -xdev -type f -perm /6000 2>/dev/null | grep . && exit 5; "
        "find /opt /usr/local -perm /022 ! -type l | grep . && exit 6; exit 0"
    )
    done = served.execute("bash", "-c", script, check=False)
    assert done.returncode == 0, done.stdout


def test_packages_of_stages_are_those_that_were_tested(served: Container) -> None:
    script = (
        "import PIL, tokenizers, numpy; print(PIL.__version__, tokenizers.__version__, numpy.__version__)"
    )
    pillow, tokenizers, numpy = served.execute("python3", "-c", script).stdout.split()
    pins = dict(re.findall(r"^([a-z]+)==([0-9.]+)", PINS.read_text(), flags=re.MULTILINE))
    assert (pillow, tokenizers) == (pins["pillow"], pins["tokenizers"])
    assert numpy.startswith("1.26.")


# --- hardened -----------------------------------------------------------------------------------------


def test_process_has_no_privilege(served: Container) -> None:
    status = dict(
        line.split(":\t", 1) for line in served.execute("cat", "/proc/1/status").stdout.splitlines()
    )
    assert status["Name"] == "tritonserver"  # gets SIGTERM itself
    assert status["Uid"].split() == ["10001"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_only_scratch_can_be_written(served: Container) -> None:
    for place in ("/x", "/opt/tritonsmith/x", "/models/x", "/var/x"):
        assert served.execute("touch", place, check=False).returncode != 0, place
    served.execute("bash", "-c", "echo x >/tmp/x && rm /tmp/x")


def test_nothing_is_reported_to_makers_of_libraries(served: Container) -> None:
    script = "tr '\\0' '\\n' </proc/1/environ | grep -x ORT_DISABLE_TELEMETRY=1"
    served.execute("bash", "-c", script)
    assert "telemetry" not in served.log()


# --- serving ------------------------------------------------------------------------------------------


def test_every_model_is_ready_without_completion(served: Container, model_repository: Path) -> None:
    status, body = ask(served, "POST", "/v2/repository/index", KEY)
    assert status == 200
    models = {entry["name"]: entry["state"] for entry in json.loads(body)}
    names = {path.parent.name for path in model_repository.glob("*/config.pbtxt")}
    assert models == dict.fromkeys(names, "READY")


def test_digits_answers_as_published(served: Container, model_repository: Path, tmp_path: Path) -> None:
    samples = tmp_path / "digits.npz"
    np.savez(samples, pixels=np.random.default_rng(7).random((24, 8, 8, 1), dtype=np.float32))
    report = validate(model_repository, "digits", samples, http_url=served.http_url, grpc_url=served.grpc_url)
    assert report.passed
    assert {check.protocol for check in report.checks} == {"http", "grpc"}


def test_ensemble_answers_as_its_steps(served: Container, model_repository: Path, tmp_path: Path) -> None:
    samples = tmp_path / "sentences.npz"
    np.savez(samples, text=SENTENCES)
    report = validate(
        model_repository, "minilm_text", samples, http_url=served.http_url, grpc_url=served.grpc_url
    )
    assert report.passed
    assert sum(check.values_count for check in report.checks) >= 2 * 384 * len(SENTENCES)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("GET", "/v2/trace/setting"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/systemsharedmemory/status"),
    ],
)
def test_operators_endpoints_ask_for_the_key(served: Container, method: str, path: str) -> None:
    assert ask(served, method, path)[0] == 403
    assert ask(served, method, path, f"{KEY}x")[0] == 403
    assert ask(served, method, path, KEY)[0] == 200


def test_operators_calls_ask_for_the_key_over_grpc(served: Container) -> None:
    with InferenceServerClient(served.grpc_url.removeprefix("grpc://")) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index()
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_system_shared_memory_status()
        headers = {"triton-grpc-protocol-tritonsmith-admin-key": KEY}
        assert len(client.get_model_repository_index(headers=headers).models) > 1


def test_a_key_opens_no_other_door(served: Container) -> None:
    """Model control is `none`: even an operator loads nothing."""
    status, body = ask(served, "POST", "/v2/repository/models/digits/unload", KEY)
    assert status != 200
    assert b"polling is enabled" in body or b"not allowed" in body, body
    assert KEY not in served.log()


def rate_limit_of(log: str) -> str:
    """As tritonserver prints it among its options."""
    (mode,) = re.findall(r"^\| rate_limit +\| (\w+) ", log, flags=re.MULTILINE)
    return str(mode)


def test_rate_limiter_of_a_configuration_is_switched_on(
    engine: Engine, cpu_image: str, served: Container, digits_alone: Path
) -> None:
    assert rate_limit_of(served.log()) == "OFF"
    with (digits_alone / "digits" / "config.pbtxt").open("a") as config:
        config.write('instance_group { kind: KIND_CPU rate_limiter { resources { name: "R" count: 1 } } }\n')
    arguments = (*HARDENED, SOON, f"--volume={digits_alone}:/models:ro", cpu_image)
    with started(engine, "tritonsmith-cpu-limited", *arguments) as container:
        container.wait_until_healthy()
        assert rate_limit_of(container.log()) == "EXEC_COUNT"


# --- the end ------------------------------------------------------------------------------------------


def test_another_user_serves_and_idle_connections_do_not_delay_the_end(
    engine: Engine, cpu_image: str, digits_alone: Path
) -> None:
    """Without docker/close_idle.c it takes all of --exit-timeout-secs (30) and exits with 1."""
    arguments = (*HARDENED, SOON, "--user=4242:4242", f"--volume={digits_alone}:/models:ro")
    with ExitStack() as stack:
        container = stack.enter_context(started(engine, "tritonsmith-cpu-other", *arguments, cpu_image))
        container.wait_until_healthy()
        connections = [
            http.client.HTTPConnection("127.0.0.1", container.port(inside), timeout=10)
            for inside in (8000, 8000, 8002)
        ]
        for connection, path in zip(
            connections, ("/v2/health/live", "/v2/models/digits", "/metrics"), strict=True
        ):
            stack.callback(connection.close)
            connection.request("GET", path)
            assert connection.getresponse().read() is not None
            assert connection.sock is not None  # kept alive
        with Client(container.grpc_url) as client:
            answer = client.model("digits")(pixels=np.zeros((1, 8, 8, 1), np.float32))
        assert answer["probabilities"].sum() == pytest.approx(1, abs=1e-5)
        assert container.execute("id", "-u").stdout.strip() == "4242"
        assert container.stop() < 15
        assert container.state("ExitCode") == "0", container.log()


def pending_count(container: Container) -> int:
    """Requests that wait while another is executed."""
    connection = http.client.HTTPConnection("127.0.0.1", container.port(8002), timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Connection": "close"})
        metrics = connection.getresponse().read().decode()
    (value,) = re.findall(r"^nv_inference_pending_request_count\{.*\} (\d+)", metrics, flags=re.MULTILINE)
    return int(value)


def test_requests_in_flight_are_answered_before_the_end(
    engine: Engine, cpu_image: str, model_repository: Path, tmp_path: Path
) -> None:
    """The signal comes while one is executed, and the others, each a batch of its own, wait for it."""
    minilm = model_repository / "minilm"
    config = tmp_path / "config.pbtxt"
    one_instance = "instance_group { count: 1 kind: KIND_CPU }\n"
    config.write_text((minilm / config.name).read_text() + one_instance)
    mounts = (f"--volume={minilm}:/models/minilm:ro", f"--volume={config}:/models/minilm/{config.name}:ro")
    tokens = {
        name: np.ones((32, 128), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    count = 3
    arguments = (*HARDENED, SOON, *mounts, cpu_image, "--exit-timeout-secs=300")
    with (
        started(engine, "tritonsmith-cpu-busy", *arguments) as container,
        ThreadPoolExecutor(count) as threads,
    ):
        container.wait_until_healthy()
        with Client(container.grpc_url) as client:
            model = client.model("minilm")
            answers = [threads.submit(model, **tokens) for _ in range(count)]
            while pending_count(container) < count - 1:
                assert not any(answer.done() for answer in answers), "too quick to be seen executing"
            container.stop()
            for answer in answers:
                assert next(iter(answer.result().values())).shape[0] == 32
        assert container.state("ExitCode") == "0", container.log()


# --- what is refused ----------------------------------------------------------------------------------


def test_a_broken_model_ends_it_with_the_reason(engine: Engine, cpu_image: str, digits_alone: Path) -> None:
    config = digits_alone / "digits" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [10]", "dims: [11]"))
    code, log = ended(engine, cpu_image, *HARDENED, f"--volume={digits_alone}:/models:ro")
    assert code == 1
    assert "failed to load 'digits' version 1" in log
    assert "config.pbtxt says dims [11], the model says [-1, 10]" in log


def test_what_a_container_lacks_is_said(engine: Engine, cpu_image: str, digits_alone: Path) -> None:
    mount = f"--volume={digits_alone}:/models:ro"
    code, log = ended(engine, cpu_image, *HARDENED)
    assert (code, "no model repository is mounted at /models" in log) == (1, True), log

    needs = "--env=TRITONSMITH_SHM_MIB=64"
    code, log = ended(engine, cpu_image, "--shm-size=16m", "--tmpfs=/tmp", needs, mount)
    assert (code, "has 16 MiB, and this repository needs 64" in log) == (1, True), log
    assert "--shm-size=64m" in log

    code, log = ended(engine, cpu_image, "--read-only", mount)
    assert (code, "tmp cannot be written" in log) == (1, True), log

    key = digits_alone.parent / "key"
    key.write_text("short")
    key.chmod(0o644)
    variables = (f"--volume={key}:/key:ro", "--env=TRITONSMITH_ADMIN_KEY_FILE=/key")
    code, log = ended(engine, cpu_image, *HARDENED, mount, *variables)
    assert (code, "the admin key in /key cannot be used" in log) == (1, True), log
    assert "short" not in log

    (digits_alone / "digits" / "1" / "model.onnx").chmod(0o600)
    code, log = ended(engine, cpu_image, *HARDENED, mount)
    assert (code, "/models/digits/1/model.onnx cannot be read by user 10001" in log) == (1, True), log


def test_the_root_of_a_block_volume_is_refused(engine: Engine, cpu_image: str, digits_alone: Path) -> None:
    """mkfs leaves lost+found there, which only root can read."""
    (digits_alone / "lost+found").mkdir(mode=0o700)
    code, log = ended(engine, cpu_image, *HARDENED, f"--volume={digits_alone}:/models:ro")
    assert code == 1
    assert "/models holds lost+found, as the root of a block volume does" in log
    assert "mount a folder below that root" in log
    assert "chmod" not in log
