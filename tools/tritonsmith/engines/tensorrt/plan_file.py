"""A plan on disk: written whole or not at all, and opened."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from tritonsmith.engines.tensorrt.log import logger_of
from tritonsmith.errors import PlanError
from tritonsmith.files import write_bytes_atomically


def write_plan(serialized: Any, out: Path) -> None:
    """Write a serialized engine (TensorRT's IHostMemory) to a temporary sibling of `out`, then rename it."""
    write_bytes_atomically(out, memoryview(serialized))


def load_engine(trt: ModuleType, path: Path) -> Any:
    """The engine of a plan; a CUDA context must be current.

    Host code in it is allowed, which a version-compatible plan holds: plans are trusted like other programs.

    Raises:
        PlanError: no such file, or TensorRT refuses it; its own reason is in the message.
    """
    if not path.is_file():
        raise PlanError(f"there is no plan {path}")
    logger, messages = logger_of(trt)
    messages.clear()
    try:
        runtime = trt.Runtime(logger)
    except TypeError as error:  # all that the binding says where CUDA does not start
        raise PlanError("TensorRT does not start", found=messages.reason(str(error))) from error
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise PlanError(
            f"TensorRT {trt.__version__} cannot load {path}",
            found=messages.reason("TensorRT gave no reason"),
            fix="build the plan again on this machine",
        )
    return engine
