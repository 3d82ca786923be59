"""The KServe v2 protocol over HTTP: calls as requests, responses as replies, and two ways to send them.

tritonclient writes and reads the bodies of inference. Its own blocking client is bound to one gevent
thread, so urllib3, whose pool any thread may use, sends them; aiohttp does under asyncio.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import urllib3
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tritonsmith.client.calls import Call, Infer
from tritonsmith.client.failures import refused, timed_out, unreachable
from tritonsmith.client.tensors import arrays_from_result

HEADER_LENGTH = "Inference-Header-Content-Length"
CONNECTION_COUNT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None


class HttpTransport:
    """Sends calls over a pool of connections, from any thread."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = f"http://{address}"
        self._timeout_s = timeout_s
        self._pool = urllib3.PoolManager(
            maxsize=CONNECTION_COUNT,
            timeout=urllib3.Timeout(total=timeout_s),
        )

    def send(self, call: Call) -> Any:
        request = _request(call)
        try:
            response = self._pool.request(
                request.method,
                self._url + request.path,
                headers=dict(request.headers),
                body=request.body,
                retries=False,
            )
        except urllib3.exceptions.NewConnectionError as error:
            raise unreachable(call, self._url, _reason(error)) from error
        except urllib3.exceptions.TimeoutError as error:
            raise timed_out(call, self._url, self._timeout_s) from error
        except urllib3.exceptions.HTTPError as error:
            raise unreachable(call, self._url, error) from error
        return _reply(call, self._url, response.status, response.headers, response.data)

    def close(self) -> None:
        self._pool.clear()


class AsyncHttpTransport:
    """Sends calls within one event loop."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = f"http://{address}"
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTION_COUNT),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def send(self, call: Call) -> Any:
        request = _request(call)
        try:
            async with self._session.request(
                request.method, self._url + request.path, headers=request.headers, data=request.body
            ) as response:
                body = await response.read()
        except asyncio.TimeoutError as error:
            raise timed_out(call, self._url, self._timeout_s) from error
        except (aiohttp.ClientError, OSError) as error:
            raise unreachable(call, self._url, getattr(error, "os_error", error)) from error
        return _reply(call, self._url, response.status, response.headers, body)

    async def close(self) -> None:
        await self._session.close()


def _request(call: Call) -> Request:
    path = f"/v2/models/{quote(call.model, safe='')}"
    if call.version:
        path += f"/versions/{quote(call.version, safe='')}"
    headers = {"Accept-Encoding": "identity"}  # compressing costs more than it saves on a near network
    if not isinstance(call, Infer):
        suffix = {"metadata": "", "config": "/config", "statistics": "/stats"}[call.what]
        return Request(method="GET", path=path + suffix, headers=headers, body=None)
    inputs = []
    for tensor, array in call.inputs:
        value = InferInput(tensor.name, list(array.shape), tensor.datatype)
        inputs.append(value.set_data_from_numpy(array))
    outputs = [InferRequestedOutput(name, class_count=count) for name, count in call.outputs.items()]
    body, header_length = InferenceServerClient.generate_request_body(inputs, outputs)
    if isinstance(body, str):
        body = body.encode()
    if header_length is not None:
        headers[HEADER_LENGTH] = str(header_length)
    headers["Content-Type"] = "application/octet-stream"
    return Request(method="POST", path=path + "/infer", headers=headers, body=body)


def _reply(call: Call, url: str, status: int, headers: Mapping[str, str], body: bytes) -> Any:
    if status != 200:
        raise refused(call, url, f"HTTP {status}: {_message(body)}")
    try:
        if not isinstance(call, Infer):
            return json.loads(body)
        result = InferenceServerClient.parse_response_body(body, header_length=headers.get(HEADER_LENGTH))
        return arrays_from_result(call.outputs, result)
    except (ValueError, KeyError, TypeError, InferenceServerException) as error:
        raise refused(call, url, f"an answer that is not Triton's: {_message(body)}") from error


def _message(body: bytes) -> str:
    """Triton's own message, or the start of what another server said."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "an empty answer"


def _reason(error: urllib3.exceptions.NewConnectionError) -> str:
    return str(error.__cause__ or error)
