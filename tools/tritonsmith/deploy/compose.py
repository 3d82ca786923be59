"""A folder for Compose: Triton, its balancer and its dashboards, sized by what was measured."""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonsmith.containers import SAFE_SINCE, find_container
from tritonsmith.deploy import compose_services as services
from tritonsmith.deploy.balancer import buffer_bytes_for, memory_bytes_for_balancer, render_haproxy
from tritonsmith.deploy.context import context_files
from tritonsmith.deploy.flags import Role
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.measurements_file import check_measurements, model_folders
from tritonsmith.deploy.sizes import (
    GPU_HOST,
    HTTP_INPUT,
    MIB,
    Sizes,
    explain_sizes,
    sizes_from_measurements,
)
from tritonsmith.deploy.targets import check_target, gpu_target
from tritonsmith.errors import DeployError, UsageError

DOCKER = Path(__file__).with_name("docker")
STATIC = (
    *("Dockerfile.cpu", "Dockerfile.gpu", ".dockerignore", ".gitignore", "entrypoint.sh", "close_idle.c"),
    *("build.sh", "drain.sh", "make_secrets.sh", "README.md"),
)
STATIC_FOLDERS = ("grafana",)
RENDERED = ("compose.yaml", "compose.cpu.yaml", "haproxy.cfg", "prometheus.yml", ".env.example")
_WIDTH = 110
# Threads count too, and their number grows with the cores: on two, 8 instances had 355 of them.
_BASE_PIDS, _INSTANCE_PIDS = 1024, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeOptions:
    """What a deployment may choose. Raises UsageError for what is out of range, unknown or unsafe."""

    repository: str | None = None  # as the files name it, relative to them; None: its absolute path
    release: str = "26.07"  # of NVIDIA's images
    replicas: int = 2  # behind the balancer; the first is there without it
    gpu_target: str | None = None  # --model-config-name on GPUs; None: the only one with plans

    def __post_init__(self) -> None:
        if not 2 <= self.replicas <= 64:
            raise UsageError("--replicas: a balancer needs replicas", found=self.replicas, expected="2 to 64")
        if find_container(self.release).release < SAFE_SINCE:
            raise UsageError(
                f"--release {self.release} lacks fixes of security holes that are known",
                expected=f"{SAFE_SINCE} or later",
            )


def render_compose(
    repository: Path, measurements: Measurements, options: ComposeOptions
) -> Mapping[str, bytes]:
    """File name -> content of a folder that needs nothing beside it but the repository.

    Raises:
        DeployError: no repository, measurements of another one, or two targets of plans to choose from.
        ProvisionError: a requirements.txt that cannot be read.
        RepositoryError: a config.pbtxt that cannot be parsed.
    """
    check_measurements(measurements, repository)
    texts = render_settings(repository, measurements, options)
    files = {name: text.encode() for name, text in texts.items()}
    files |= context_files(repository)
    for name in STATIC:
        files[name] = (DOCKER / name).read_bytes()
    for folder in STATIC_FOLDERS:
        for path in sorted(path for path in (DOCKER / folder).rglob("*") if path.is_file()):
            files[path.relative_to(DOCKER).as_posix()] = path.read_bytes()
    return files


def render_settings(repository: Path, measurements: Measurements, options: ComposeOptions) -> dict[str, str]:
    """The files of RENDERED: all that depends on the repository and its measurements, and nothing else."""
    check_target(repository, measurements.target)
    sizes = sizes_from_measurements(measurements)
    names = ("triton", *(f"triton-{index}" for index in range(2, options.replicas + 1)))
    header = _origin(repository, measurements)
    return {
        "compose.yaml": _compose_file("gpu", repository, measurements, sizes, options, names),
        "compose.cpu.yaml": _compose_file("cpu", repository, measurements, sizes, options, names),
        "haproxy.cfg": render_haproxy(
            DOCKER / "haproxy.cfg.template", measurements, replicas=names, header=header
        ),
        "prometheus.yml": _prometheus_file(names, header),
        ".env.example": _environment_example(repository, sizes, options, measurements.target or "", header),
    }


def _compose_file(
    role: Role,
    repository: Path,
    measurements: Measurements,
    sizes: Sizes,
    options: ComposeOptions,
    names: tuple[str, ...],
) -> str:
    target = gpu_target(repository, options.gpu_target) if role == "gpu" else measurements.target or ""
    settings = services.TritonService(
        role=role,
        release=options.release,
        repository=_source(repository, options),
        target=target,
        pids=_pids_for(measurements),
    )
    memory = memory_bytes_for_balancer(measurements)
    content: dict[str, Any] = {
        "services": {
            names[0]: services.triton(settings, sizes, published=True),
            **{
                name: services.triton(settings, sizes, published=False, profile="balanced")
                for name in names[1:]
            },
            "balancer": services.balancer(names, memory),
            "prometheus": services.prometheus(),
            "grafana": services.grafana(),
            "bench": services.bench(options.release, *_bench_model(repository)),
        },
        "secrets": {
            "triton_admin_key": {"file": "${TRITON_ADMIN_KEY_FILE:-./secrets/triton_admin_key}"},
            "grafana_admin_password": {
                "file": "${GRAFANA_ADMIN_PASSWORD_FILE:-./secrets/grafana_admin_password}"
            },
        },
        "volumes": {name: {} for name in (("plans",) if role == "gpu" else ()) + ("prometheus", "grafana")},
    }
    return _header(role, repository, measurements, sizes) + "\n" + _yaml(content)


def _prometheus_file(names: tuple[str, ...], header: str) -> str:
    template = string.Template((DOCKER / "prometheus.yml.template").read_text(encoding="utf-8"))
    return template.substitute(header=header, replicas=", ".join(names))


def _yaml(content: Mapping[str, Any]) -> str:
    """In the order of the mapping, with an empty line before each service and each part."""
    import yaml

    lines = yaml.safe_dump(content, sort_keys=False, width=_WIDTH, allow_unicode=True).splitlines()
    text: list[str] = []
    for line in lines:
        own = len(line) - len(line.lstrip())
        if text and (own == 0 or (own == 2 and text[-1].startswith("   "))):
            text.append("")
        text.append(line)
    return "\n".join(text) + "\n"


def _header(role: Role, repository: Path, measurements: Measurements, sizes: Sizes) -> str:
    """What this file is, what it was rendered from, and which measured value gave which setting."""
    why = explain_sizes(measurements, sizes)
    buffer_kib = buffer_bytes_for(measurements) >> 10
    settings = {
        "shm_size": why["shm"],
        "mem_limit": why["memory"],
        "cpus": why["cpu"],
        "pids_limit": f"{_BASE_PIDS}, and {_INSTANCE_PIDS} for each instance; not measured",
        "stop_grace_period": f"--exit-timeout-secs and 5 s more. {why['exit-timeout']}",
        "start_period": "an hour for the first build of plans, which was not measured"
        if role == "gpu"
        else why["startup-probe"],
        "balancer's mem_limit": f"two buffers of {buffer_kib} KiB (a largest request, at most 256 KiB) "
        "on each connection",
    }
    what = {"gpu": "Triton on NVIDIA GPUs", "cpu": "Triton on CPUs"}[role]
    lines = [
        f"# {what}, with Prometheus and Grafana. Profiles: balanced (replicas behind haproxy) and",
        "# bench (perf_analyzer). How to use it: README.md. What can be set from outside: .env.example.",
        *_origin(repository, measurements).splitlines(),
    ]
    if role == "gpu":
        memory = f"{math.ceil(sizes.gpu_memory_bytes / MIB)}Mi: {GPU_HOST.value:g}Mi beside what CPUs need"
        settings["mem_limit"] = f"{memory} ({why['memory']}). {GPU_HOST.why}"
        lines += [
            "# It was measured on CPUs: on GPUs, the time to stop may be another, and so may mem_limit."
        ]
        if sizes.http_max_input_bytes is not None:
            settings["--http-max-input-size"] = f"the largest request x {HTTP_INPUT.value:g}"
    for name, sentence in settings.items():
        lines += textwrap.wrap(
            f"{name}: {sentence}", _WIDTH, initial_indent="#   ", subsequent_indent="#     "
        )
    return "\n".join(lines)


def _origin(repository: Path, measurements: Measurements) -> str:
    machine = measurements.machine
    text = (
        f"Rendered by `tritonsmith deploy compose` for {repository.resolve().name}: "
        "render it again rather than change it. "
        f"Measured on {machine.get('cpu', 'an unknown CPU')} with {machine.get('cpu_count', '?')} cores "
        f"in {measurements.runs} runs, target {measurements.target or 'default'}, "
        f"fingerprint {measurements.fingerprint[:12]}."
    )
    return "\n".join(
        textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    )


def _spoken(target: str) -> str:
    return f"the target {target}" if target else "every model's config.pbtxt"


def _environment_example(
    repository: Path, sizes: Sizes, options: ComposeOptions, measured_target: str, header: str
) -> str:
    source = _source(repository, options).replace("$$", "$")
    variables = {
        "MODEL_REPOSITORY": source,
        "TRITON_RELEASE": options.release,
        "TRITON_CPU_IMAGE": "tritonsmith-cpu",
        "TRITON_GPU_IMAGE": "tritonsmith-gpu",
        "TRITON_USER": "10001:10001",
        "TRITON_CPUS": f"{sizes.cpu_limit_milli / 1000:.1f}",
        "TRITON_HTTP_PORT": "8000",
        "TRITON_GRPC_PORT": "8001",
        "TRITON_METRICS_PORT": "8002",
        "BALANCER_HTTP_PORT": "8100",
        "BALANCER_GRPC_PORT": "8101",
        "PROMETHEUS_PORT": "9090",
        "PROMETHEUS_RETENTION": "15d",
        "GRAFANA_PORT": "3000",
        "TRITON_ADMIN_KEY_FILE": "./secrets/triton_admin_key",
        "GRAFANA_ADMIN_PASSWORD_FILE": "./secrets/grafana_admin_password",
        "BENCH_MODEL": _bench_model(repository)[0],
        "BENCH_CONCURRENCY": "1:8:2",
        **services.IMAGES,
    }
    lines = [
        header,
        "# Copy this to .env and take the # from what you change. The values are the defaults.",
        f"# TRITONSMITH_TARGET: compose.yaml serves {_spoken(gpu_target(repository, options.gpu_target))}, "
        f"compose.cpu.yaml {_spoken(measured_target)}.",
        "# A value here, also an empty one (every model's config.pbtxt), is for both files.",
    ]
    return "\n".join([*lines, *(f"#{name}={value}" for name, value in variables.items())]) + "\n"


def _source(repository: Path, options: ComposeOptions) -> str:
    """Compose reads a dollar as a variable, and the closing brace as its end."""
    source = options.repository or str(repository.absolute())
    if "}" in source or "\n" in source:
        raise DeployError(
            "Compose cannot name this path", found=source, fix="rename the folder, or link to it"
        )
    return source.replace("$", "$$")


def _pids_for(measurements: Measurements) -> int:
    return _BASE_PIDS + _INSTANCE_PIDS * sum(model.instances for model in measurements.models)


def _bench_model(repository: Path) -> tuple[str, list[str]]:
    """A model that perf_analyzer can feed with numbers of its own, and what it must be told of free axes.

    The first whose inputs are numbers of fixed shapes; else the first with numbers, free axes being 1; else
    the first.
    """
    from tritonsmith.repository.entry import read_config

    names = [folder.name for folder in model_folders(repository)]
    numeric = []
    for name in names:
        inputs = read_config(repository, name).input
        if any(tensor.data_type == _TYPE_STRING for tensor in inputs):
            continue
        free = [
            f"--shape={tensor.name}:{','.join(str(max(1, size)) for size in tensor.dims)}"
            for tensor in inputs
            if min(tensor.dims, default=1) < 0
        ]
        if not free:
            return name, []
        numeric.append((name, free))
    return numeric[0] if numeric else (names[0], [])


_TYPE_STRING = 13  # model_config.proto: DataType
