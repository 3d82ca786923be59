"""How to serve, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tritonsmith.errors import UsageError

ModelControl = Literal["none", "poll", "explicit"]

# Flags that serve() sets itself, and what to use in their place.
_OWN_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "--model-repository": "the repository argument",
        "--model-store": "the repository argument",
        "--http-port": "http_port (--http-port before the --)",
        "--grpc-port": "grpc_port (--grpc-port before the --)",
        "--metrics-port": "metrics_port (--metrics-port before the --)",
        "--model-control-mode": "model_control (--model-control before the --)",
        "--load-model": "load_models (--load-model before the --)",
        "--exit-timeout-secs": "exit_timeout_s (--exit-timeout before the --)",
        "--http-address": "nothing: the embedded server answers on 127.0.0.1 alone",
        "--grpc-address": "nothing: the embedded server answers on 127.0.0.1 alone",
        "--metrics-address": "nothing: the embedded server answers on 127.0.0.1 alone",
        "--backend-directory": "nothing: the backends belong to the server's environment",
        "--allow-http": "nothing: readiness is asked over HTTP",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to serve a repository. Port 0 means any free port. Raises UsageError for a value out of range."""

    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    model_control: ModelControl = "none"
    load_models: tuple[str, ...] = ()  # with explicit control
    poll_interval_s: int = 2  # with poll control
    target: str | None = None  # serve configs/<target>.pbtxt where a model has it; None: config.pbtxt
    flags: tuple[str, ...] = ()  # of tritonserver, beside those that serve() sets
    cache_bytes: int = 64 << 20  # for the models that ask for the response cache
    ready_timeout_s: float = 60.0
    exit_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        for name, port in ports.items():
            if not 0 <= port <= 65535:
                raise UsageError(f"the {name} port is out of range", found=port, expected="0 to 65535")
        chosen = [port for port in ports.values() if port]
        if len(chosen) != len(set(chosen)):
            raise UsageError("two services cannot share a port", found=ports)
        if self.model_control not in ("none", "poll", "explicit"):
            raise UsageError(
                "no such model control", found=self.model_control, expected="none, poll or explicit"
            )
        if self.load_models and self.model_control != "explicit":
            raise UsageError(
                "load_models needs explicit model control",
                found=self.model_control,
                fix="add --model-control explicit",
            )
        for name, seconds in (("ready", self.ready_timeout_s), ("exit", self.exit_timeout_s)):
            if not seconds > 0:
                raise UsageError(f"the {name} time-out must be above 0 s", found=seconds)
        for flag in self.flags:
            _refuse_own_flag(flag)
            if self.target is not None and flag.startswith("--model-config-name"):
                raise UsageError(f"target {self.target!r} and {flag} say the same", fix="keep one of the two")


def _refuse_own_flag(flag: str) -> None:
    """A beginning of a flag is refused with it: tritonserver's getopt_long takes abbreviations."""
    name = flag.split("=", 1)[0]
    own = next((own for own in _OWN_FLAGS if name.startswith("--") and own.startswith(name)), None)
    if own is not None:
        raise UsageError(f"{flag} cannot be passed to tritonserver here", fix=f"use {_OWN_FLAGS[own]}")
