"""Waiting for a server to be ready, and what its log says where it is not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from tritonsmith.errors import ServerError
from tritonsmith.server.launch import Launch
from tritonsmith.server.ports import ask_http

_POLL_S = 0.02
_LINES = 40
_GLOG = re.compile(r'^([IWEF])\d{4} [\d:.]+ \d+ (?P<place>[\w.]+:\d+)\] "?(?P<text>.*?)"?$')
# Said on every machine without a GPU.
_HARMLESS = ("CudaDriverHelper", "CUDA memory pool", "pinned system memory", "NVML", "DCGM")
_REFUSED = re.compile(
    r"failed to load '(?P<model>[^']+)' version (?P<version>-?\d+): (?P<reason>.*)", re.DOTALL
)


def wait_until_ready(
    launch: Launch, http_port: int, *, timeout_s: float, cancelled: Callable[[], bool]
) -> None:
    """Return when the server says that it is ready; raise ServerError when it ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not cancelled():
        if launch.exit_code is not None:
            raise ServerError(
                f"tritonserver ended while starting ({describe_exit(launch.exit_code)})",
                found=relevant_lines(launch.read_log()),
            )
        try:
            if ask_http(http_port, "GET", "/v2/health/ready", timeout_s=2)[0] == 200:
                return
        except OSError:
            pass  # not listening yet
        if time.monotonic() > deadline:
            raise ServerError(
                f"tritonserver was not ready after {timeout_s:g} s",
                found=relevant_lines(launch.read_log()),
                fix="raise ready_timeout_s where a model takes long to load",
            )
        time.sleep(_POLL_S)


def describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def relevant_lines(log: str) -> str:
    """What matters in a log of tritonserver: its errors, and what models and stubs printed beside it."""
    kept: list[str] = []
    keep = False
    for line in log.splitlines():
        entry = _GLOG.match(line)
        if entry:
            keep = entry[1] in "EF" and not any(word in line for word in _HARMLESS)
            text = entry["text"]
        else:
            # a table, or the rest of an entry; what stands alone comes from a model or a crash
            text = line
        if (keep or (entry is None and _is_speech(line))) and text.strip() and text not in kept:
            kept.append(text.rstrip())
    return "\n    ".join(kept[-_LINES:]) or "nothing in its log"


def _is_speech(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(("|", "+-"))
