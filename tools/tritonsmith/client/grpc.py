"""The KServe v2 protocol over gRPC: calls as methods of tritonclient's clients, and two ways to send them.

The blocking and the asyncio client of tritonclient have the same methods; a gRPC channel may be used from
any thread.
"""

from __future__ import annotations

from typing import Any, NoReturn

import tritonclient.grpc.aio
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tritonsmith.client.calls import Call, Infer
from tritonsmith.client.failures import refused, timed_out, unreachable
from tritonsmith.client.tensors import arrays_from_result

METHODS = {
    "metadata": "get_model_metadata",
    "config": "get_model_config",
    "statistics": "get_inference_statistics",
}


class GrpcTransport:
    """Sends calls over one channel, from any thread."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = f"grpc://{address}"
        self._timeout_s = timeout_s
        self._client = InferenceServerClient(address)

    def send(self, call: Call) -> Any:
        method, arguments = _request(call, self._timeout_s)
        try:
            return _reply(call, getattr(self._client, method)(**arguments))
        except InferenceServerException as error:
            _fail(error, call, self._url, self._timeout_s)

    def close(self) -> None:
        self._client.close()


class AsyncGrpcTransport:
    """Sends calls within one event loop."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = f"grpc://{address}"
        self._timeout_s = timeout_s
        self._client = tritonclient.grpc.aio.InferenceServerClient(address)

    async def send(self, call: Call) -> Any:
        method, arguments = _request(call, self._timeout_s)
        try:
            return _reply(call, await getattr(self._client, method)(**arguments))
        except InferenceServerException as error:
            _fail(error, call, self._url, self._timeout_s)

    async def close(self) -> None:
        await self._client.close()


def _request(call: Call, timeout_s: float) -> tuple[str, dict[str, Any]]:
    arguments: dict[str, Any] = {
        "model_name": call.model,
        "model_version": call.version,
        "client_timeout": timeout_s,
    }
    if not isinstance(call, Infer):
        return METHODS[call.what], {**arguments, "as_json": True}
    arguments["inputs"] = []
    for tensor, array in call.inputs:
        value = InferInput(tensor.name, array.shape, tensor.datatype)
        arguments["inputs"].append(value.set_data_from_numpy(array))
    arguments["outputs"] = [
        InferRequestedOutput(name, class_count=count) for name, count in call.outputs.items()
    ]
    return "infer", arguments


def _reply(call: Call, reply: Any) -> Any:
    if isinstance(call, Infer):
        return arrays_from_result(call.outputs, reply)
    return reply["config"] if call.what == "config" else reply


def _fail(error: InferenceServerException, call: Call, url: str, timeout_s: float) -> NoReturn:
    status = str(error.status()).removeprefix("StatusCode.")
    if status == "DEADLINE_EXCEEDED":
        raise timed_out(call, url, timeout_s) from error
    if status == "UNAVAILABLE" and "unknown model" not in error.message():
        raise unreachable(call, url, error.message()) from error
    raise refused(call, url, f"{status}: {error.message()}") from error
