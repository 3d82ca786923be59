"""OpenVINO on the CPU, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.engines import Arrays
from tritonsmith.errors import EngineError, MissingExtraError

SUFFIXES = (".onnx", ".xml")
SINK = "/sink_port_0"  # what OpenVINO appends to an output's name to name its Result node
NARROWED = ("int64", "uint64", "uint32")
INT32 = np.iinfo(np.int32)
# OpenVINO's names of element types, where they are not numpy's
TYPE_NAMES = {
    "f32": "float32",
    "f64": "float64",
    "f16": "float16",
    "bf16": "bfloat16",
    "boolean": "bool",
    **{
        f"{sign}{bits}": f"{word}{bits}"
        for sign, word in (("i", "int"), ("u", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


class OpenVinoSession:
    """A model in OpenVINO; one call at a time."""

    def __init__(self, path: Path, compiled: Any) -> None:
        self._path = path
        self._request = compiled.create_infer_request()
        self._inputs = {name_of(port): port for port in compiled.inputs}
        self._outputs = {name_of(port): port for port in compiled.outputs}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """All outputs by name; bfloat16 is that of ml_dtypes.

        Raises:
            EngineError: an input is missing, unknown, misshapen or beyond what OpenVINO computes with,
                or the computation fails.
        """
        if sorted(inputs) != sorted(self._inputs):  # OpenVINO would compute on whatever lies in memory
            raise EngineError(
                f"{self._path} was given other inputs than it has",
                found=sorted(inputs),
                expected=sorted(self._inputs),
            )
        try:
            for name, array in inputs.items():
                self._request.set_tensor(self._inputs[name], self._tensor(name, np.asarray(array)))
            self._request.infer()
            return {name: self._array(port) for name, port in self._outputs.items()}
        except (RuntimeError, ValueError, TypeError) as error:
            raise EngineError(f"OpenVINO cannot run {self._path}", found=reason_of(error)) from error

    def _tensor(self, name: str, array: NDArray[Any]) -> Any:
        import openvino

        array = np.require(array, requirements="C")
        if array.dtype.name in NARROWED and array.size and not fits_int32(array):
            raise EngineError(
                f"OpenVINO cannot take input {name!r} of {self._path}",
                found=f"{array.dtype} from {array.min()} to {array.max()}",
                expected=f"{INT32.min} to {INT32.max}: its CPU plugin computes in int32",
                fix="use the engine onnxruntime",
            )
        if array.dtype == dtypes.BY_NAME["bfloat16"].numpy:
            return openvino.Tensor(array.view(np.uint16), openvino.Shape(array.shape), openvino.Type.bf16)
        return openvino.Tensor(array)

    def _array(self, port: Any) -> NDArray[Any]:
        tensor = self._request.get_tensor(port)
        data: NDArray[Any] = tensor.data
        if tensor.element_type.get_type_name() == "bf16":
            data = data.view(np.uint16).view(dtypes.BY_NAME["bfloat16"].numpy)
        return np.array(data)  # OpenVINO uses the memory again in the next call


def open_openvino(
    path: Path, *, threads: int | None = None, precision: str | None = "f32"
) -> OpenVinoSession:
    """Load an .onnx or .xml file; `threads` bounds one call's parallelism (default: all cores).

    `precision` is OpenVINO's INFERENCE_PRECISION_HINT. "f32" computes exactly what the file says; None is
    OpenVINO's own choice, bfloat16 on machines that have it, and what a server does by default.

    Raises:
        EngineError: OpenVINO refuses the file.
        MissingExtraError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("OpenVINO cannot be used", package="openvino", extra="openvino") from error
    if path.suffix not in SUFFIXES or not path.is_file():
        raise EngineError(f"OpenVINO cannot load {path}", expected=f"a file named {' or '.join(SUFFIXES)}")
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        model = core.read_model(str(path))
        _refuse_types(path, model)
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot load {path}", found=reason_of(error)) from error
    return OpenVinoSession(path, compiled)


def name_of(port: Any) -> str:
    """The name that the model's author gave to an input or output.

    Several names can lie on one port where the graph passes a tensor through; the one of the Result
    node is the output's own.
    """
    own = port.node.friendly_name.removesuffix(SINK)
    names = port.names
    if own in names or not names:
        return str(own)
    return str(min(names))


def fits_int32(array: NDArray[Any]) -> bool:
    return bool(array.min() >= INT32.min and array.max() <= INT32.max)


def reason_of(error: BaseException) -> str:
    """OpenVINO's own words on one line, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    words = [line for line in lines if line and not line.startswith("Exception from src/")]
    return " ".join(words) or type(error).__name__


def _refuse_types(path: Path, model: Any) -> None:
    for port in (*model.inputs, *model.outputs):
        kind = port.element_type.get_type_name()
        if kind not in TYPE_NAMES:
            # strings: openvino 2026.4 gives back stale text and frees foreign memory
            raise EngineError(
                f"OpenVINO cannot serve {path}: tensor {name_of(port)!r} is {kind}",
                expected="numbers or booleans",
                fix="use the engine onnxruntime",
            )
