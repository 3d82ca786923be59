"""Running an artifact in this process, on the engines that Triton's backends wrap.

`open_session` is the one door; each engine is a file that is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from tritonsmith.errors import UsageError

ENGINES = ("onnxruntime", "openvino")

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """A loaded model."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """All outputs by name, for arrays by input name, batch axis included."""


def open_session(
    path: Path, *, engine: str = "onnxruntime", threads: int | None = None, precision: str | None = "f32"
) -> Session:
    """Load a model file into an engine; `threads` bounds one call's parallelism (default: the engine's).

    `precision` is what OpenVINO computes floats in, None for its own choice; ONNX Runtime always computes
    what the file says.

    Raises:
        EngineError: the engine refuses the file; its own reason is in the message.
        MissingExtraError: the engine is not installed.
        UsageError: no such engine.
    """
    if engine == "onnxruntime":
        from tritonsmith.engines.onnxruntime import open_onnxruntime

        return open_onnxruntime(path, threads=threads)
    if engine == "openvino":
        from tritonsmith.engines.openvino import open_openvino

        return open_openvino(path, threads=threads, precision=precision)
    raise UsageError(f"no engine is named {engine!r}", expected=" or ".join(ENGINES))
