"""Requests at a fixed rate, whatever becomes of those before: an open loop over gRPC."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

MODEL = "digits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the requests."""

    answered: int
    lost: Mapping[str, int]  # status -> how many
    slowest_s: float
    median_s: float

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {status}" for status, count in self.lost.items()) or "none"
        return (
            f"{self.answered} answered, lost: {lost}; median {1000 * self.median_s:.1f} ms, "
            f"slowest {1000 * self.slowest_s:.0f} ms"
        )


def send_at_rate(
    url: str, *, count: int, rate_per_s: float, midway: Callable[[], object], timeout_s: float = 20.0
) -> Outcome:
    """Send `count` requests; a quarter of the way `midway` begins in a thread of its own.

    Raises whatever `midway` raised, after the last answer.
    """
    return asyncio.run(_send(url, count, rate_per_s, midway, timeout_s))


async def _send(
    url: str, count: int, rate_per_s: float, midway: Callable[[], object], timeout_s: float
) -> Outcome:
    async with triton.InferenceServerClient(url) as client:
        image = triton_input()
        await client.infer(MODEL, [image], client_timeout=timeout_s)  # the connection is open
        begin = time.monotonic()
        tasks = []
        event: asyncio.Task[object] | None = None
        for index in range(count):
            delay = begin + index / rate_per_s - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            if index == count // 4:
                event = asyncio.create_task(asyncio.to_thread(midway))
            tasks.append(asyncio.create_task(_ask(client, image, timeout_s)))
        results = await asyncio.gather(*tasks)
        if event is not None:
            await event
    lost = collections.Counter(status for status, _ in results if status is not None)
    times = sorted(seconds for status, seconds in results if status is None)
    return Outcome(
        answered=len(times),
        lost=dict(lost),
        slowest_s=times[-1] if times else float("nan"),
        median_s=times[len(times) // 2] if times else float("nan"),
    )


async def _ask(
    client: triton.InferenceServerClient, image: triton.InferInput, timeout_s: float
) -> tuple[str | None, float]:
    begin = time.monotonic()
    try:
        answer = await client.infer(MODEL, [image], client_timeout=timeout_s)
    except (InferenceServerException, grpc.RpcError) as error:
        status = error.status() if isinstance(error, InferenceServerException) else error.code()
        return str(status), time.monotonic() - begin
    seconds = time.monotonic() - begin
    total = float(answer.as_numpy("probabilities").sum())
    return (None if abs(total - 1) < 1e-3 else f"a wrong answer, sum {total}"), seconds


def triton_input() -> triton.InferInput:
    image = triton.InferInput("pixels", [1, 8, 8, 1], "FP32")
    image.set_data_from_numpy(np.zeros((1, 8, 8, 1), np.float32))
    return image
