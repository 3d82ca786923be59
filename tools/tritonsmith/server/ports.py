"""Ports of this machine, and the plain HTTP questions that a start needs."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

from tritonsmith.errors import ServerError

LOOPBACK = "127.0.0.1"
_BIND_FAILED = re.compile(r"(already in use|failed to bind|Address already in use|Unavailable - Socket)")


def find_free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def refuse_used_port(port: int, name: str) -> None:
    """Raise ServerError where `port` cannot be bound; `name` is http, grpc or metrics."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's rest is no user
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()
        except OSError as error:
            raise port_error(port, name, error.strerror or str(error)) from error


def port_error(port: int, name: str, reason: str) -> ServerError:
    holder = _find_holder(port)
    return ServerError(
        f"port {port}, wanted for {name}, cannot be used",
        found=f"{reason}{f' ({holder})' if holder else ''}",
        fix=f"stop what uses it, or choose another with --{name}-port P (0 takes any free port)",
    )


def _find_holder(port: int) -> str | None:
    """The process that listens on `port`, where this user may know."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            if any(str(link.readlink()) in inodes for link in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                return f"process {process.name}, {name}"
        except OSError:
            continue
    return None


def ask_http(port: int, method: str, path: str, body: Any = None, timeout_s: float = 10.0) -> tuple[int, str]:
    """One request to this machine on a connection of its own: status and text. Raises OSError."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout_s)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"no HTTP answer on port {port}: {error!r}") from error
    finally:
        connection.close()


def is_lost(port: int, log: str) -> bool:
    """Whether tritonserver's log says that another process had taken `port`."""
    return any(f":{port}" in line and _BIND_FAILED.search(line) for line in log.splitlines())
