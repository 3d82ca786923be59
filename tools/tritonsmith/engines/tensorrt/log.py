"""What TensorRT says while it works: warnings and errors kept, so that an error of ours can quote them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

KEPT = 200
SHOWN = 8


class Messages:
    """The last lines that TensorRT logged, with their severity ("ERROR", "WARNING")."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def add(self, severity: str, text: str) -> None:
        self._lines = [*self._lines[-(KEPT - 1) :], (severity, " ".join(text.split()))]

    def clear(self) -> None:
        """Forget what was said before: a new piece of work begins."""
        self._lines = []

    def reason(self, otherwise: str) -> str:
        """What TensorRT said of a failure: its errors, else its warnings, else `otherwise`."""
        return reason_from_lines(self._lines, otherwise)


def reason_from_lines(lines: Sequence[tuple[str, str]], otherwise: str) -> str:
    """Errors before warnings, each once, the last ones."""
    for severities in (("INTERNAL_ERROR", "ERROR"), ("WARNING",)):
        texts = list(dict.fromkeys(text for severity, text in lines if severity in severities))
        if texts:
            return "\n    ".join(texts[-SHOWN:])
    return otherwise


@functools.cache
def logger_of(trt: ModuleType) -> tuple[Any, Messages]:
    """The one logger of this process: TensorRT keeps the first that it is given and ignores all others."""
    messages = Messages()

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                messages.add(severity.name, text)

    return Log(), messages
