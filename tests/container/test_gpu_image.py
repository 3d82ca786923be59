"""Dockerfile.gpu, built on a stand-in for NVIDIA's image, which cannot be had here.

The stand-in is Debian with a libnvinfer that only tells its version and a tritonserver that only prints its
arguments. So every instruction runs; what is NVIDIA's own, TensorRT and the driver, is not tested by this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_engine import Engine, started
from plan_orders import publish_order
from tritonsmith.deploy.context import context_files
from tritonsmith.deploy.flags import server_flags

pytestmark = pytest.mark.container

ROOT = Path(__file__).resolve().parents[2]
STAND_IN, IMAGE = "compose-stand-in", "compose-gpu"
TENSORRT = (10, 16, 1, 11)  # published as a binding for the stand-in's Python too
TRITON = "2.71.0"
HARDENED = ("--read-only", "--tmpfs=/tmp:rw,nosuid,nodev,noexec,size=16m", "--cap-drop=ALL")
TARGET = "--env=TRITONSMITH_TARGET=gpu"
PARTS = ("Major", "Minor", "Patch", "Build")
LIBRARY = "".join(
    f"int getInferLib{part}Version(void) {{ return {number}; }}\n"
    for part, number in zip(PARTS, TENSORRT, strict=True)
)
DOCKERFILE = f"""
FROM debian:bookworm-slim
RUN apt-get update \\
 && apt-get install -y --no-install-recommends python3 python3-pip python3-numpy gcc libc6-dev
COPY nvinfer.c /tmp/
RUN gcc -shared -fPIC -o /usr/lib/x86_64-linux-gnu/libnvinfer.so.{TENSORRT[0]} /tmp/nvinfer.c \\
 && mkdir -p /opt/nvidia /opt/tritonserver/bin \\
 && printf '#!/bin/sh\\nexec "$@"\\n' >/opt/nvidia/nvidia_entrypoint.sh \\
 && printf '#!/bin/sh\\nprintf "%%s\\\\n" "$@"\\n' >/opt/tritonserver/bin/tritonserver \\
 && chmod +x /opt/nvidia/nvidia_entrypoint.sh /opt/tritonserver/bin/tritonserver
ENV TRITON_SERVER_VERSION={TRITON}
USER 1000
"""


def build(engine: Engine, folder: Path, tag: str, *arguments: str) -> None:
    secrets = []
    for name, path in (("ca", os.environ.get("SSL_CERT_FILE", "")), ("pipconf", "/etc/pip.conf")):
        if os.access(path, os.R_OK):
            secrets += ["--secret", f"id={name},src={path}"]
    done = subprocess.run(
        [engine.client, "build", "--network=host", "--tag", tag, *secrets, *arguments, str(folder)],
        env={**engine.variables(), "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def gpu_image(engine: Engine, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    stand_in = tmp_path_factory.mktemp("stand-in")
    (stand_in / "nvinfer.c").write_text(LIBRARY)
    (stand_in / "Dockerfile").write_text(DOCKERFILE)
    build(engine, stand_in, STAND_IN)
    context = tmp_path_factory.mktemp("gpu") / "docker"
    shutil.copytree(ROOT / "docker", context, ignore=shutil.ignore_patterns("secrets", ".env"))
    for name, content in context_files(ROOT / "model_repository").items():
        (context / name).write_bytes(content)
    build(
        engine, context, IMAGE, "--file", str(context / "Dockerfile.gpu"), "--build-arg", f"BASE={STAND_IN}"
    )
    yield IMAGE
    engine.run("rmi", IMAGE, STAND_IN, check=False)


def in_image(engine: Engine, image: str, *command: str) -> str:
    entry = ["--entrypoint", command[0]]
    return engine.run("run", "--rm", "--read-only", *entry, image, *command[1:]).stdout.strip()


def test_binding_is_of_the_librarys_build(engine: Engine, gpu_image: str) -> None:
    asked = "import importlib.metadata as m, sys; sys.path.insert(0, '/opt/tritonsmith/python'); "
    asked += "print(m.version('tensorrt-cu13-bindings'))"
    version = in_image(engine, gpu_image, "python3", "-c", asked)
    assert version.startswith(".".join(map(str, TENSORRT)))


def test_tools_run_and_the_images_python_has_none_of_them(engine: Engine, gpu_image: str) -> None:
    assert "plans" in in_image(engine, gpu_image, "tritonsmith", "--help")
    absent = "import importlib.util as u; print(u.find_spec('onnx'), u.find_spec('tritonsmith'))"
    assert in_image(engine, gpu_image, "python3", "-c", absent) == "None None"


def test_stage_packages_are_there_and_numpy_is_the_images_own(engine: Engine, gpu_image: str) -> None:
    asked = "import PIL, tokenizers, numpy; print(PIL.__file__, numpy.__file__)"
    pillow, numpy = in_image(engine, gpu_image, "python3", "-c", asked).split()
    assert pillow.startswith("/opt/tritonsmith/stages/")
    assert numpy.startswith("/usr/lib/python3/dist-packages/")


def test_server_starts_as_another_user_with_the_flags_of_its_release(engine: Engine, gpu_image: str) -> None:
    started = engine.run(
        *("run", "--rm", *HARDENED, "--user", "54321:54321"),
        *("--volume", f"{ROOT / 'model_repository'}:/models:ro", gpu_image, "--exit-timeout-secs=7"),
    )
    flags = started.stdout.splitlines()
    wanted = server_flags(TRITON, "gpu")
    assert "--allow-client-shm=false" in wanted  # a later release than the embedded one
    assert "--model-repository=/models" in flags
    kept = [flag for flag in wanted if "admin-key" not in flag]
    assert [flag for flag in kept if flag not in flags] == []
    assert sum("admin-key" in flag for flag in flags) == 2  # HTTP and gRPC, each with a key of its own start
    assert flags[-1] == "--exit-timeout-secs=7"


def test_image_runs_as_nobody_in_particular(engine: Engine, gpu_image: str) -> None:
    config = engine.run(
        "inspect", "--format", "{{.Config.User}} {{.Config.Healthcheck.Test}}", gpu_image
    ).stdout
    assert config.startswith("10001:10001 ")
    assert "healthcheck" in config


def start(engine: Engine, image: str, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    mount = f"--volume={repository}:/models:ro"
    return engine.run("run", "--rm", *HARDENED, *arguments, mount, image, check=False)


def test_target_without_a_gpu_is_served_by_its_fallback_from_a_view(
    engine: Engine, gpu_image: str, tmp_path: Path
) -> None:
    """The view lies in the container's own /tmp: a volume's would be replaced under another replica."""
    publish_order(tmp_path / "models", tmp_path / "work", ("fp16", "fp32"), fallback="gpu.fp32.onnx")
    done = start(engine, gpu_image, tmp_path / "models", TARGET)
    assert done.returncode == 0, done.stderr
    flags = done.stdout.splitlines()
    assert {"--model-repository=/tmp/view", "--model-config-name=gpu"} <= set(flags)
    assert not [flag for flag in flags if flag.startswith("--rate-limit")]
    assert "gpu.fp32.onnx is served by ONNX Runtime instead" in done.stderr
    assert "laid the view /tmp/view over /models" in done.stderr


def test_target_without_a_gpu_and_without_fallback_is_refused(
    engine: Engine, gpu_image: str, tmp_path: Path
) -> None:
    publish_order(tmp_path / "models", tmp_path / "work", ("fp16",))
    done = start(engine, gpu_image, tmp_path / "models", TARGET)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "--model-repository" not in done.stdout
    assert "1 of 1 plans cannot be built on this machine" in done.stderr
    assert "linear version 1, target gpu" in done.stderr
    assert "Traceback" not in done.stderr


def test_rate_limiter_of_a_target_is_switched_on(engine: Engine, gpu_image: str, tmp_path: Path) -> None:
    publish_order(tmp_path / "models", tmp_path / "work", ("fp32",), fallback="gpu.fp32.onnx")
    config = tmp_path / "models" / "linear" / "configs" / "gpu.pbtxt"
    resources = 'rate_limiter { resources { name: "R" count: 1 } }'
    text = config.read_text()
    assert text.count("instance_group {") == 1
    config.write_text(text.replace("instance_group {", f"instance_group {{ {resources}"))
    flags = start(engine, gpu_image, tmp_path / "models", TARGET).stdout.splitlines()
    assert "--rate-limit=execution_count" in flags


def test_stop_while_plans_are_built_ends_the_build(engine: Engine, gpu_image: str, tmp_path: Path) -> None:
    """`tritonsmith` is a stand-in that builds for long and takes a second to end."""
    build = tmp_path / "tritonsmith"
    build.write_text(
        "#!/bin/bash\n"
        "trap 'sleep 1; echo the build has ended; exit 1' TERM\n"
        "echo building; for ((i = 0; i < 6000; i++)); do sleep 0.1; done\n"
    )
    build.chmod(0o755)
    mounts = (
        f"--volume={ROOT / 'model_repository'}:/models:ro",
        f"--volume={build}:/usr/local/bin/tritonsmith:ro",
    )
    with started(engine, "compose-gpu-stopped", *HARDENED, TARGET, *mounts, gpu_image) as container:
        deadline = time.monotonic() + 60
        while "building" not in container.log():
            assert time.monotonic() < deadline, container.log()
            time.sleep(0.1)
        assert container.stop() < 30  # then comes SIGKILL, after 60
        assert container.state("ExitCode") == "143"
        assert "the build has ended" in container.log()
