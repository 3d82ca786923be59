"""The blocking and the asyncio client: one surface, two drivers of the same conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from tritonsmith.client.address import read_address
from tritonsmith.client.calls import Conversation, Result, ask_signature, ask_statistics, infer
from tritonsmith.client.signature import Signature

# Requests of one split batch that are under way together; more than a model has instances hides the network.
IN_FLIGHT_COUNT = 8
TIMEOUT_S = 60.0


class Client:
    """A blocking client of one Triton server; any number of threads may share it.

    Args:
        url: `http://host:port`, `grpc://host:port`, or `host:port` with `protocol`.
        protocol: "http" (the default) or "grpc", where the URL does not say.
        timeout_s: the longest wait for one answer, in seconds.
    """

    def __init__(self, url: str, *, protocol: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        protocol, address = read_address(url, protocol, timeout_s)
        self._transport: Any
        if protocol == "grpc":
            from tritonsmith.client.grpc import GrpcTransport

            self._transport = GrpcTransport(address, timeout_s)
        else:
            from tritonsmith.client.http import HttpTransport

            self._transport = HttpTransport(address, timeout_s)
        self._threads = ThreadPoolExecutor(IN_FLIGHT_COUNT, thread_name_prefix="tritonsmith-client")

    def model(self, name: str, version: int | str | None = None) -> Model:
        """The model, once its signature is read from the server."""
        return Model(self, self._hold(ask_signature(name, version)))

    def statistics(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """The server's statistics of one model, by Triton's own field names."""
        return self._hold(ask_statistics(name, version))

    def close(self) -> None:
        """Close all connections. The client cannot be used again."""
        self._threads.shutdown()
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _hold(self, conversation: Conversation[Result]) -> Result:
        replies: list[Any] | None = None
        while True:
            try:
                calls = conversation.send(replies)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if len(calls) == 1:
                replies = [self._transport.send(calls[0])]
            else:
                replies = list(self._threads.map(self._transport.send, calls))


class Model:
    """A model on a server, called with arrays by input name.

    `signature` is what the server said when the model was asked for.
    """

    def __init__(self, client: Client, signature: Signature) -> None:
        self._client = client
        self.signature = signature

    def __call__(
        self,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        outputs: Sequence[str] | None = None,
        classes: Mapping[str, int] | None = None,
        **named: Any,
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name, for inputs in a mapping, by keyword, or both.

        The first axis of every array is the batch where the model has one, also for a single sample. A
        batch longer than `max_batch_size` is sent in several requests at once and joined. A value that its
        data type cannot hold exactly is refused; Python floats are rounded, and bfloat16 is given as
        float32, whose low bits are cut off. Strings go as str or bytes,
        and come as bytes in an object array.

        Args:
            inputs: arrays, or lists that numpy can make arrays of.
            outputs: the names of the outputs to answer (default: all).
            classes: output name -> how many of its best classes to answer in place of the numbers, as
                strings "value:index" or, where the server knows labels, "value:index:label".

        Raises:
            ClientError: inputs that do not fit, a server that refuses or fails or cannot be reached, or no
                answer in time.
        """
        return self._client._hold(infer(self.signature, inputs, named, outputs, classes))


class AsyncClient:
    """The same client for asyncio. It belongs to the event loop in which it was made."""

    def __init__(self, url: str, *, protocol: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        protocol, address = read_address(url, protocol, timeout_s)
        self._transport: Any
        if protocol == "grpc":
            from tritonsmith.client.grpc import AsyncGrpcTransport

            self._transport = AsyncGrpcTransport(address, timeout_s)
        else:
            from tritonsmith.client.http import AsyncHttpTransport

            self._transport = AsyncHttpTransport(address, timeout_s)

    async def model(self, name: str, version: int | str | None = None) -> AsyncModel:
        """The model, once its signature is read from the server."""
        return AsyncModel(self, await self._hold(ask_signature(name, version)))

    async def statistics(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """The server's statistics of one model, by Triton's own field names."""
        return await self._hold(ask_statistics(name, version))

    async def close(self) -> None:
        """Close all connections. The client cannot be used again."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _hold(self, conversation: Conversation[Result]) -> Result:
        slots = asyncio.Semaphore(IN_FLIGHT_COUNT)

        async def send(call: Any) -> Any:
            async with slots:
                return await self._transport.send(call)

        replies: list[Any] | None = None
        while True:
            try:
                calls = conversation.send(replies)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as stop:
                result: Result = stop.value
                return result
            replies = await _gather([asyncio.ensure_future(send(call)) for call in calls])


class AsyncModel:
    """A model on a server, awaited with arrays by input name; see `Model`."""

    def __init__(self, client: AsyncClient, signature: Signature) -> None:
        self._client = client
        self.signature = signature

    async def __call__(
        self,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        outputs: Sequence[str] | None = None,
        classes: Mapping[str, int] | None = None,
        **named: Any,
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name; arguments and errors are those of `Model`."""
        return await self._client._hold(infer(self.signature, inputs, named, outputs, classes))


async def _gather(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """All results in order; where one task fails, the others are ended before its error is raised."""
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
