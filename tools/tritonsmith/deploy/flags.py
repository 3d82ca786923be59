"""The flags of tritonserver in production, in one place, for the images, Compose and Kubernetes.

Runs on a bare Python: an image writes its flags while it is built (`python3 -m tritonsmith.deploy.flags`).
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Literal

from tritonsmith.errors import DeployError

Role = Literal["cpu", "gpu"]

EMBEDDED_TRITON = "2.51.0"  # what server/environment.py brings: the CPU image's
HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002
EXIT_TIMEOUT_S = 30
CACHE_BYTES = 64 << 20
HTTP_MAX_INPUT_BYTES = 64 << 20
RESPONSE_POOL_COUNT = 64
# A client's gRPC channel is asked to reconnect this often, so that a new replica gets its share.
CONNECTION_AGE_MS = 300_000
KEEPALIVE_MS = 30_000

# Whoever may call these loads code, reads files of the host or fills its memory.
RESTRICTED = ("shared-memory", "model-repository", "trace", "logging")
ADMIN_HEADER = "tritonsmith-admin-key"
# Stands for the key where flags are kept in a file; entrypoint.sh fills it in.
KEY_PLACEHOLDER = "@ADMIN_KEY@"
_VERSION = re.compile(r"2\.(\d{1,3})(\..*)?")

# The first release 2.x that has a flag.
_RESPONSE_POOL_SINCE = 57
_HTTP_MAX_INPUT_SINCE = 59
_CLIENT_SHM_SINCE = 68
_HISTOGRAMS_SINCE = 53


def server_flags(triton: str = EMBEDDED_TRITON, role: Role = "cpu") -> tuple[str, ...]:
    """The flags that every start has, without the repository's path.

    Endpoints of an operator answer only to the admin key, which KEY_PLACEHOLDER stands for, in the HTTP
    header `tritonsmith-admin-key` and in gRPC's metadata `triton-grpc-protocol-tritonsmith-admin-key`.
    A flag of a later release than `triton` ("2.51.0") is left out: Triton exits at one that it does not know.
    Where a flag is given twice, Triton takes the later one, so what is added behind these may change them.
    `--rate-limit` depends on the repository, so entrypoint.sh decides on it.
    Raises DeployError for a version that cannot be read.
    """
    minor = _minor_from_version(triton)
    restricted = f"{','.join(RESTRICTED)}:{ADMIN_HEADER}={KEY_PLACEHOLDER}"
    flags = [
        f"--http-port={HTTP_PORT}",
        f"--grpc-port={GRPC_PORT}",
        f"--metrics-port={METRICS_PORT}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--exit-on-error=true",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--log-format=ISO8601",
        "--trace-config=level=OFF",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        *_balancing_flags(),
        *_metrics_flags(role, minor),
        f"--cache-config=local,size={CACHE_BYTES}",
    ]
    if minor >= _RESPONSE_POOL_SINCE:
        flags.append(f"--grpc-max-response-pool-size={RESPONSE_POOL_COUNT}")
    if minor >= _HTTP_MAX_INPUT_SINCE:
        flags.append(f"--http-max-input-size={HTTP_MAX_INPUT_BYTES}")
    if minor >= _CLIENT_SHM_SINCE:
        flags.append("--allow-client-shm=false")
    return tuple(flags)


def _balancing_flags() -> tuple[str, ...]:
    """Dead peers are noticed, clients may ping through a balancer, and channels are renewed now and then.

    No grace is set for a connection past its age: calls in flight, streams among them, end by themselves.
    """
    return (
        f"--grpc-max-connection-age={CONNECTION_AGE_MS}",
        f"--grpc-keepalive-time={KEEPALIVE_MS}",
        "--grpc-keepalive-timeout=10000",
        "--grpc-keepalive-permit-without-calls=1",
        "--grpc-http2-max-pings-without-data=0",
        "--grpc-http2-min-recv-ping-interval-without-data=10000",
    )


def _metrics_flags(role: Role, minor: int) -> tuple[str, ...]:
    """Latencies as quantiles in every release; as histograms, which add up over replicas, where there are."""
    flags = [
        f"--allow-gpu-metrics={'true' if role == 'gpu' else 'false'}",
        "--metrics-config=summary_latencies=true",
        "--metrics-config=summary_quantiles=0.5:0.05,0.9:0.01,0.99:0.001",
    ]
    if minor >= _HISTOGRAMS_SINCE:
        flags.append("--metrics-config=histogram_latencies=true")
    return tuple(flags)


def _minor_from_version(version: str) -> int:
    match = _VERSION.fullmatch(version)
    if match is None:
        raise DeployError("no such version of Triton", found=version, expected="2.51.0, say")
    return int(match[1])


def main(arguments: list[str] | None = None) -> int:
    """One flag a line. The images run this while they are built."""
    parser = argparse.ArgumentParser(prog="python3 -m tritonsmith.deploy.flags", description=main.__doc__)
    parser.add_argument("--triton", default=EMBEDDED_TRITON, help="its version (default: %(default)s)")
    parser.add_argument("--role", choices=("cpu", "gpu"), default="cpu")
    given = parser.parse_args(arguments)
    try:
        flags = server_flags(given.triton, given.role)
    except DeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
