"""A process that measures, and the one that asks it: one JSON request and one JSON answer a line.

TensorRT and PyTorch want different Pythons and different libraries, so each has a process of its own; asked
in turn by one script, they share the GPU's pace. Only the standard library is used.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Answer = dict[str, Any]
Handler = Callable[..., Answer]


class WorkerError(Exception):
    """What was asked for cannot be had; the reason is the message."""


class Worker:
    """The asking side."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._name = name

    def ask(self, do: str, *, timeout_s: float, **arguments: Any) -> Answer:
        """The answer to one request.

        Raises:
            WorkerError: the worker refuses, is too slow (it is ended then), or is gone.
        """
        if self._process.poll() is not None:
            raise WorkerError(f"{self._name} has ended")
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"{self._name} has ended") from error
        answer: Answer = json.loads(self._read_line(timeout_s))
        if (reason := answer.pop("refused", None)) is not None:
            raise WorkerError(reason)
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None  # noqa: S101
        ends_s = time.monotonic() + timeout_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, ends_s - time.monotonic())):
                    self.close()
                    raise WorkerError(f"no answer within {timeout_s:.0f} s")
                block = os.read(self._process.stdout.fileno(), 1 << 16)
                if not block:
                    raise WorkerError(f"{self._name} ended with exit status {self._process.wait()}")
                line += block
        return line

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def answer_requests(handlers: Mapping[str, Handler], refusals: tuple[type[Exception], ...]) -> None:
    """The answering side: read requests until there are none.

    Whatever libraries print goes to stderr, so that answers stand alone on stdout. An exception of `refusals`
    is answered with its message; any other ends the process with its traceback.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except refusals as error:
            answer = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(json.dumps(answer), file=answers, flush=True)
