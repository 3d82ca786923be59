"""One inference proved, by value, in the very environment that serves.

numpy 2 breaks Triton 24.10's Python stub silently: the server answers 200 with empty tensors. A wrong
libpython or locale shows only when a model imports `ssl` or reads text. So a server is called ready only
after a model that does all of that has answered rightly.

The proof runs at every start in a server of its own, beside the one that starts: same binary, environment,
backends and variables. In the user's server it would stay in the list of models and in the metrics (model
control `none` cannot unload), and a user's own model cannot be asked without samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tritonsmith.errors import ServerError
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.server.launch import Launch
from tritonsmith.server.ports import ask_http, find_free_port, is_lost
from tritonsmith.server.ready import wait_until_ready

PROOF_REPOSITORY = Path(__file__).with_name("proof")
_TRIES = 3  # another process may take the port first
_MODEL = "tritonsmith_proof"
_NUMBERS = [1.5, -2.0, 3.25]
_TEXT = "é ist "
_REQUEST = {
    "inputs": [
        {"name": "number", "datatype": "FP32", "shape": [3], "data": _NUMBERS},
        {"name": "text", "datatype": "BYTES", "shape": [1], "data": [_TEXT]},
    ]
}
_EXPECTED = {"doubled": [3.0, -4.0, 6.5], "echo": ["é ist größer als naïve"]}


def prove_inference(
    environment: ServerEnvironment,
    *,
    timeout_s: float = 60.0,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Start a server for one model, ask it, compare by value, end it. Raises ServerError."""
    for attempt in range(1, _TRIES + 1):
        port = find_free_port()
        arguments = [
            f"--http-port={port}",
            "--http-address=127.0.0.1",
            "--allow-grpc=false",
            "--allow-metrics=false",
        ]
        with Launch(environment, PROOF_REPOSITORY, arguments, http_port=port, exit_timeout_s=10) as launch:
            try:
                wait_until_ready(launch, port, timeout_s=timeout_s, cancelled=cancelled)
                if cancelled():
                    return None
                status, body = ask_http(port, "POST", f"/v2/models/{_MODEL}/infer", _REQUEST)
            except (ServerError, OSError) as error:
                if launch.exit_code is None:
                    raise ServerError(
                        "the embedded server did not prove an inference in time",
                        found=error,
                        fix="run again when the machine is less busy",
                    ) from error
                if attempt < _TRIES and is_lost(port, launch.read_log()):
                    continue
                raise _failure(environment, str(error)) from error
            finally:
                launch.kill()  # nothing is in flight, and an orderly stop takes a second
        if status != 200:
            raise _failure(environment, body)
        return _compare(environment, json.loads(body))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _compare(environment: ServerEnvironment, answer: dict[str, Any]) -> None:
    outputs = {output["name"]: output.get("data") for output in answer.get("outputs", [])}
    for name, expected in _EXPECTED.items():
        if outputs.get(name) != expected:
            raise _failure(environment, f"{name} = {outputs.get(name)}", expected=f"{name} = {expected}")


def _failure(environment: ServerEnvironment, found: str, expected: str | None = None) -> ServerError:
    return ServerError(
        "the embedded server does not compute what it should",
        found=found,
        expected=expected,
        fix=f"remove {environment.folder} and run again: it is then rebuilt (numpy must be below 2 in it)",
    )
