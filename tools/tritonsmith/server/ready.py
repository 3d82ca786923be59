"""Waiting for a server to be ready, and saying why it is not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from tritonsmith.errors import ServerError
from tritonsmith.server.launch import Launch
from tritonsmith.server.log import Refusal, find_refusals, find_unfinished, relevant_lines
from tritonsmith.server.ports import ask_http

_POLL_S = 0.02


def wait_until_ready(
    launch: Launch, http_port: int, *, timeout_s: float, cancelled: Callable[[], bool]
) -> None:
    """Return when the server says that it is ready, or when `cancelled` says so.

    Raises ServerError when the server ends (with the reason of each model that it refused) or takes too long.
    """
    deadline = time.monotonic() + timeout_s
    while not cancelled():
        if launch.exit_code is not None:
            raise failure_of(launch.read_log(), launch.exit_code)
        with contextlib.suppress(OSError):  # not listening yet
            if ask_http(http_port, "GET", "/v2/health/ready", timeout_s=2)[0] == 200:
                return
        if time.monotonic() > deadline:
            raise _lateness_of(launch.read_log(), timeout_s)
        time.sleep(_POLL_S)


def failure_of(log: str, exit_code: int) -> ServerError:
    """Why a server ended before it was ready."""
    refusals = find_refusals(log)
    if not refusals:
        return ServerError(
            f"tritonserver ended while starting ({describe_exit(exit_code)})", found=relevant_lines(log)
        )
    names = ", ".join(refusal.model for refusal in refusals)
    return ServerError(
        f"Triton refuses {'the model' if len(refusals) == 1 else 'the models'} {names}",
        found="\n    ".join(_quote(refusal) for refusal in refusals),
        fix=_fix_of(refusals),
    )


def describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _lateness_of(log: str, timeout_s: float) -> ServerError:
    unfinished = find_unfinished(log)
    found = f"still loading {', '.join(unfinished)}" if unfinished else relevant_lines(log)
    return ServerError(
        f"Triton was not ready after {timeout_s:g} s",
        found=found,
        fix="raise ready_timeout_s where a model takes long to load",
    )


def _quote(refusal: Refusal) -> str:
    lines = [line for line in refusal.reason.splitlines() if line.strip() and "importlib" not in line]
    return "\n      ".join([f"{refusal.model}: {lines[0]}" if lines else refusal.model, *lines[1:]])


def _fix_of(refusals: tuple[Refusal, ...]) -> str:
    for refusal in refusals:
        if "ModuleNotFoundError" in refusal.reason:
            return f"name the package in {refusal.model}/requirements.txt, from which the server gets it"
    return "correct the model's config.pbtxt or files; the reason above is Triton's own"
