"""haproxy.cfg: the balancer in front of replicas, as haproxy 2.6 and later read it."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path

from tritonsmith.deploy.flags import GRPC_PORT, HTTP_PORT
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.sizes import MIB, largest_compute_s

TEMPLATE = "haproxy.cfg.template"
MAX_CONNECTIONS = 1024
_PAGE = 16 << 10  # haproxy's own default buffer
_MOST_BUFFER = 256 << 10
_HEADERS_BYTES = 4 << 10
_LEAST_TIMEOUT_S = 60
_OWN_MIB = 64


def buffer_bytes_for(measurements: Measurements) -> int:
    """One largest request and its headers, between haproxy's default and 256 KiB.

    haproxy sends a request again after a crash only where one buffer holds all of it, and every request in
    flight has two of them.
    """
    largest = max((model.request_bytes for model in measurements.models), default=0)
    return min(_MOST_BUFFER, math.ceil((largest + _HEADERS_BYTES) / _PAGE) * _PAGE)


def memory_bytes_for_balancer(measurements: Measurements) -> int:
    """haproxy's own, and both buffers of a request on each connection."""
    return _OWN_MIB * MIB + 2 * MAX_CONNECTIONS * buffer_bytes_for(measurements)


def response_timeout_s_for(measurements: Measurements) -> int:
    """After this long without an answer, a request is sent to another replica."""
    return max(_LEAST_TIMEOUT_S, math.ceil(10 * largest_compute_s(measurements)))


def render_haproxy(
    template: Path, measurements: Measurements, *, replicas: Sequence[str], header: str
) -> str:
    """`template` filled in; `replicas` are names of services, each with Triton's own ports."""
    name_width = max(len(name) for name in replicas)
    servers = {
        port: "\n".join(
            f"    server {name:<{name_width}} {name}:{port} port {HTTP_PORT}" for name in replicas
        )
        for port in (GRPC_PORT, HTTP_PORT)
    }
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        header=header.rstrip("\n"),
        max_connections=MAX_CONNECTIONS,
        buffer_bytes=buffer_bytes_for(measurements),
        response_timeout=f"{response_timeout_s_for(measurements)}s",
        grpc_servers=servers[GRPC_PORT],
        http_servers=servers[HTTP_PORT],
    )
