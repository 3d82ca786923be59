"""ONNX Runtime on the CPU, in this process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.engines import Arrays
from tritonsmith.errors import EngineError

ERRORS_ONLY, FATAL_ONLY = 3, 4  # OrtLoggingLevel; what is an error to a session is raised, in the same words
PROVIDERS = ["CPUExecutionProvider"]
BFLOAT16 = dtypes.BY_NAME["bfloat16"]
ORT_BFLOAT16 = "tensor(bfloat16)"
ORT_STRING = "tensor(string)"


class OnnxRuntimeSession:
    """A model in ONNX Runtime; `run` may be called from several threads at once."""

    def __init__(self, path: Path, session: Any) -> None:
        self._path = path
        self._session = session
        self._input_types = {value.name: value.type for value in session.get_inputs()}
        self._outputs = [(value.name, value.type) for value in session.get_outputs()]
        types = [*self._input_types.values(), *(kind for _, kind in self._outputs)]
        self._has_bfloat16 = ORT_BFLOAT16 in types

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """All outputs by name; strings are object arrays of bytes, bfloat16 is that of ml_dtypes.

        Raises:
            EngineError: an input is missing, unknown or misshapen, or the computation fails.
        """
        names = [name for name, _ in self._outputs]
        feeds = {name: self._feed(name, array) for name, array in inputs.items()}
        try:
            run = self._run_values if self._has_bfloat16 else self._session.run
            arrays = run(names, feeds)
        except engine_errors() as error:
            raise EngineError(f"ONNX Runtime cannot run {self._path}", found=reason_of(error)) from error
        return {
            name: encode_strings(array) if kind == ORT_STRING else array
            for (name, kind), array in zip(self._outputs, arrays, strict=True)
        }

    def _feed(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        array = np.asarray(array)
        if self._input_types.get(name) != ORT_STRING:
            return array
        try:
            return decode_strings(array)
        except UnicodeDecodeError as error:
            raise EngineError(
                f"ONNX Runtime cannot read input {name!r} of {self._path}", found=error, expected="UTF-8"
            ) from error

    def _run_values(self, names: list[str], feeds: Arrays) -> list[NDArray[Any]]:
        """Run on OrtValues: numpy has no bfloat16 that ONNX Runtime takes or gives."""
        import onnxruntime

        values = {}
        for name, array in feeds.items():
            if array.dtype == BFLOAT16.numpy:
                bits = np.asarray(array, order="C").view(np.uint16)
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16.onnx)
            else:
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        outputs = self._session.run_with_ort_values(names, values)
        return [_array_from_value(value) for value in outputs]


def open_onnxruntime(path: Path, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Load an .onnx file; `threads` bounds one call's parallelism (default: all cores).

    Raises:
        EngineError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    except engine_errors() as error:
        raise EngineError(f"ONNX Runtime cannot load {path}", found=reason_of(error)) from error
    return OnnxRuntimeSession(path, session)


def engine_errors() -> tuple[type[Exception], ...]:
    """Every exception class that ONNX Runtime raises; they share no root of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


def reason_of(error: BaseException) -> str:
    """ONNX Runtime's own words on one line, without its code in brackets."""
    text = " ".join(str(error).split())
    return text.removeprefix("[ONNXRuntimeError] : ") or type(error).__name__


def decode_strings(array: NDArray[Any]) -> NDArray[Any]:
    """Strings as `str` objects: ONNX Runtime would take bytes by their repr."""
    texts = [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in array.ravel()]
    return objects_of(texts, array.shape)


def encode_strings(array: NDArray[Any]) -> NDArray[Any]:
    """Strings as bytes, as Triton and `samples` hold them."""
    return objects_of([text.encode("utf-8") for text in array.ravel()], array.shape)


def objects_of(items: Sequence[object], shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def _array_from_value(value: Any) -> NDArray[Any]:
    array: NDArray[Any]
    if value.data_type() != ORT_BFLOAT16:
        array = value.numpy()
        return array
    size = value.tensor_size_in_bytes()
    bits = np.frombuffer(ctypes.string_at(value.data_ptr(), size) if size else b"", dtype=np.uint16)
    array = bits.view(BFLOAT16.numpy).reshape(value.shape()).copy()
    return array
