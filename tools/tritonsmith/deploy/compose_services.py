"""The services of compose.yaml and compose.cpu.yaml, as plain data.

Only what Compose 1.29 and 2 both read: no top-level name, limits as mem_limit, cpus and pids_limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tritonsmith.deploy.flags import GRPC_PORT, HTTP_PORT, METRICS_PORT, Role
from tritonsmith.deploy.sizes import GRACE, MIB, PLAN_BUILD, Sizes

Service = dict[str, Any]

# One place for the images of others. Each is a default that an environment variable of that name changes.
IMAGES = {
    "PROMETHEUS_IMAGE": "prom/prometheus:v3.13.2",
    "GRAFANA_IMAGE": "grafana/grafana:13.2.3",
    "HAPROXY_IMAGE": "haproxy:3.2",
}
DRAIN_PORT, BALANCER_METRICS_PORT = 9999, 8404  # as in the template of haproxy.cfg
_NOBODY, _GRAFANA = "65534:65534", "472:0"  # whose the folders for data in these images are


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonService:
    """What distinguishes one Compose file's Triton from another's."""

    role: Role
    release: str
    repository: str  # as the host names it
    target: str
    pids: int


def triton(settings: TritonService, sizes: Sizes, *, published: bool, profile: str | None = None) -> Service:
    """One replica; only a published one has ports on the host."""
    gpu = settings.role == "gpu"
    service: Service = _profile(profile)
    service["build"] = {"context": ".", "dockerfile": f"Dockerfile.{settings.role}"}
    if gpu:
        service["build"]["args"] = {"TRITON_RELEASE": _variable("TRITON_RELEASE", settings.release)}
    service["image"] = _variable(f"TRITON_{settings.role.upper()}_IMAGE", f"tritonsmith-{settings.role}")
    service |= _hardened(
        user=_variable("TRITON_USER", "10001:10001"),
        memory_bytes=sizes.gpu_memory_bytes if gpu else sizes.memory_bytes,
        cpus=_variable("TRITON_CPUS", f"{sizes.cpu_limit_milli / 1000:.1f}"),
        pids=settings.pids,
    )
    service["shm_size"] = _mebibytes(sizes.shm_bytes)
    service["command"] = [f"--exit-timeout-secs={sizes.exit_timeout_s}"]
    if (
        gpu and sizes.http_max_input_bytes is not None
    ):  # the CPU image's Triton has no such flag, and no bound
        service["command"].append(f"--http-max-input-size={sizes.http_max_input_bytes}")
    service["stop_grace_period"] = f"{sizes.exit_timeout_s + int(GRACE.value)}s"
    service["environment"] = {
        # Without the colon: set but empty asks for every model's config.pbtxt.
        "TRITONSMITH_TARGET": f"${{TRITONSMITH_TARGET-{settings.target}}}",
        "TRITONSMITH_ADMIN_KEY_FILE": "/run/secrets/triton_admin_key",
        "TRITONSMITH_SHM_MIB": str(sizes.shm_bytes // MIB),
    }
    service["secrets"] = ["triton_admin_key"]
    source = _variable("MODEL_REPOSITORY", settings.repository)
    service["volumes"] = [{"type": "bind", "source": source, "target": "/models", "read_only": True}]
    service["healthcheck"] = {
        "test": ["CMD", "/usr/local/bin/entrypoint", "healthcheck"],
        "interval": "5s",
        "timeout": "5s",
        "retries": 3,
        "start_period": f"{int(PLAN_BUILD.value) if gpu else sizes.startup.patience_s}s",
    }
    if published:
        service["ports"] = [
            _port("TRITON_HTTP_PORT", HTTP_PORT),
            _port("TRITON_GRPC_PORT", GRPC_PORT),
            _port("TRITON_METRICS_PORT", METRICS_PORT),
        ]
    if gpu:
        service["volumes"].append({"type": "volume", "source": "plans", "target": "/var/cache/tritonsmith"})
        service["ulimits"] = {"memlock": -1}  # memory is pinned for copies to the GPU
        device = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def balancer(replicas: Sequence[str], memory_bytes: int) -> Service:
    """haproxy in front of `replicas`; started with the profile balanced."""
    service = _profile("balanced")
    service["image"] = _variable("HAPROXY_IMAGE", IMAGES["HAPROXY_IMAGE"])
    service |= _hardened(user="10001:10001", memory_bytes=memory_bytes, cpus="1.0", pids=64)
    service["command"] = ["haproxy", "-W", "-db", "-f", "/etc/haproxy.cfg"]
    service["stop_signal"] = "SIGUSR1"  # ends when the requests in flight are answered
    service["stop_grace_period"] = "15s"
    service["volumes"] = [_file("./haproxy.cfg", "/etc/haproxy.cfg")]
    probe = (
        f"exec 3<>/dev/tcp/127.0.0.1/{BALANCER_METRICS_PORT} "
        "&& printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $$line == *' 200 '* ]]"
    )
    service["healthcheck"] = _check(["CMD", "bash", "-c", probe])
    service["ports"] = [
        _port("BALANCER_HTTP_PORT", HTTP_PORT, 8100),
        _port("BALANCER_GRPC_PORT", GRPC_PORT, 8101),
    ]
    service["depends_on"] = list(replicas)
    return service


def prometheus() -> Service:
    service: Service = {"image": _variable("PROMETHEUS_IMAGE", IMAGES["PROMETHEUS_IMAGE"])}
    service |= _hardened(user=_NOBODY, memory_bytes=1024 * MIB, cpus="1.0", pids=128)
    service["command"] = [
        "--config.file=/etc/prometheus/prometheus.yml",
        "--storage.tsdb.path=/prometheus",
        "--storage.tsdb.retention.time=" + _variable("PROMETHEUS_RETENTION", "15d"),
        "--storage.tsdb.retention.size=8GB",
    ]
    service["volumes"] = [
        _file("./prometheus.yml", "/etc/prometheus/prometheus.yml"),
        {"type": "volume", "source": "prometheus", "target": "/prometheus"},
    ]
    service["healthcheck"] = _check(["CMD", "wget", "-q", "--spider", "http://127.0.0.1:9090/-/ready"])
    service["ports"] = [_port("PROMETHEUS_PORT", 9090)]
    service["stop_grace_period"] = "30s"
    return service


def grafana() -> Service:
    """Its admin password comes from a secret; without the file, Grafana refuses to start."""
    service: Service = {"image": _variable("GRAFANA_IMAGE", IMAGES["GRAFANA_IMAGE"])}
    service |= _hardened(user=_GRAFANA, memory_bytes=512 * MIB, cpus="1.0", pids=256)
    service["environment"] = {
        # Two dollars are one to Grafana, which reads the file itself.
        "GF_SECURITY_ADMIN_PASSWORD": "$$__file{/run/secrets/grafana_admin_password}",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        "GF_USERS_ALLOW_SIGN_UP": "false",
        "GF_LOG_MODE": "console",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": "/etc/grafana/dashboards/triton.json",
    }
    service["secrets"] = ["grafana_admin_password"]
    service["volumes"] = [
        _file("./grafana/provisioning", "/etc/grafana/provisioning"),
        _file("./grafana/dashboards", "/etc/grafana/dashboards"),
        {"type": "volume", "source": "grafana", "target": "/var/lib/grafana"},
    ]
    service["healthcheck"] = _check(["CMD", "wget", "-q", "--spider", "http://127.0.0.1:3000/api/health"])
    service["ports"] = [_port("GRAFANA_PORT", 3000)]
    service["depends_on"] = ["prometheus"]
    service["stop_grace_period"] = "15s"
    return service


def bench(release: str, model: str, shape_arguments: Sequence[str]) -> Service:
    """perf_analyzer of NVIDIA's SDK image against the first replica; `docker-compose run --rm bench`."""
    service = _profile("bench")
    sdk = f"nvcr.io/nvidia/tritonserver:{_variable('TRITON_RELEASE', release)}-py3-sdk"
    service["image"] = sdk
    service |= _hardened(user="10001:10001", memory_bytes=2048 * MIB, cpus="1.0", pids=512)
    service["command"] = [
        *("perf_analyzer", "-u", f"triton:{GRPC_PORT}", "-i", "grpc"),
        *("-m", _variable("BENCH_MODEL", model), *shape_arguments),
        *("--concurrency-range", _variable("BENCH_CONCURRENCY", "1:8:2"), "--percentile", "99"),
    ]
    service["restart"] = "no"
    service["depends_on"] = {"triton": {"condition": "service_healthy"}}
    return service


def _hardened(*, user: str, memory_bytes: int, cpus: str, pids: int) -> Service:
    return {
        "restart": "unless-stopped",
        "user": user,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp:rw,nosuid,nodev,noexec,size=16m"],  # noqa: S108 - in the container
        "pids_limit": pids,
        "mem_limit": _mebibytes(memory_bytes),
        "cpus": cpus,
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
    }


def _profile(name: str | None) -> Service:
    return {} if name is None else {"profiles": [name]}


def _check(test: list[str]) -> Service:
    return {"test": test, "interval": "10s", "timeout": "5s", "retries": 3, "start_period": "60s"}


def _file(source: str, target: str) -> dict[str, Any]:
    return {"type": "bind", "source": source, "target": target, "read_only": True}


def _port(variable: str, inside: int, outside: int | None = None) -> str:
    """On the loopback of the host alone."""
    return f"127.0.0.1:{_variable(variable, str(outside or inside))}:{inside}"


def _variable(name: str, default: str) -> str:
    return f"${{{name}:-{default}}}"


def _mebibytes(count: int) -> str:
    return f"{math.ceil(count / MIB)}m"
