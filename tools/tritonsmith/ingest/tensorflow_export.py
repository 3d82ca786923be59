"""A TensorFlow function on flat lists of tensors, exported to ONNX by tf2onnx."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec, tool_versions
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.onnx_model import load_model, save_model

OPSET_OF_TF2ONNX = 18  # the newest that tf2onnx 1.17 writes
TOOLS = ("tensorflow", "tensorflow-cpu", "keras", "tf-keras", "tf2onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An input of a source: None is an axis that is free."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatFunction:
    """What a source computes, on lists of tensors in the order of its names."""

    source: Path
    inputs: tuple[Port, ...]
    output_names: tuple[str, ...]
    call: Callable[[list[Any]], list[Any]]


def import_framework(name: str, source: Path) -> Any:
    """Import tensorflow, keras, tf_keras or tf2onnx, on the TensorFlow backend and without their noise.

    Raises:
        MissingExtraError: it is not installed.
        SourceError: it is broken, or Keras already runs on another backend in this process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        with _native_stderr_held(source):
            importlib.import_module("tensorflow")
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise MissingExtraError(f"cannot read {source}", package=package, extra="keras") from error
    for logger in ("tensorflow", "absl", "tf2onnx"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if name == "keras" and (backend := module.backend.backend()) != "tensorflow":
        raise SourceError(
            f"cannot read {source}",
            found=f"Keras runs on {backend} in this process",
            expected="the TensorFlow backend",
            fix="set KERAS_BACKEND=tensorflow before the start, and import keras nowhere before it",
        )
    return module


def export_flat(
    function: FlatFunction, folder: Path, options: ConvertOptions, *, kind: str, notes: Mapping[str, Json]
) -> Exported:
    """Trace `function`, write `raw.onnx` into `folder`, and say what went in and out.

    Raises:
        SourceError: TensorFlow cannot trace it, or tf2onnx cannot convert one of its operations.
    """
    tf = import_framework("tensorflow", function.source)
    tf2onnx = import_framework("tf2onnx", function.source)
    signature = [
        tf.TensorSpec(port.shape, tf.as_dtype(port.dtype), name=f"input_{index:03d}")
        for index, port in enumerate(function.inputs)
    ]

    @tf.function(input_signature=signature, autograph=False)
    def traced(*tensors: Any) -> dict[str, Any]:
        outputs = function.call(list(tensors))
        return {f"output_{index:03d}": tf.identity(value) for index, value in enumerate(outputs)}

    opset = min(options.opset or OPSET_OF_TF2ONNX, OPSET_OF_TF2ONNX)
    model, _ = tf2onnx.convert.from_function(traced, input_signature=signature, opset=opset)
    raw = folder / "raw.onnx"
    save_model(model, raw)
    inputs = tuple(
        TensorSpec(name=port.name, dtype=port.dtype, shape=_axes(port.name, port.shape))
        for port in function.inputs
    )
    structured = traced.get_concrete_function().structured_outputs
    outputs = tuple(
        TensorSpec(name=name, dtype=tensor.dtype.name, shape=_axes(name, tuple(tensor.shape)))
        for name, tensor in zip(
            function.output_names, (structured[k] for k in sorted(structured)), strict=True
        )
    )
    return Exported(
        kind=kind,
        raw=raw,
        inputs=inputs,
        outputs=outputs,
        batched=all(spec.shape[:1] == (BATCH_AXIS,) for spec in inputs + outputs),
        reference=_reference(tf, function),
        tools=tool_versions(*TOOLS),
        options={"opset": opset, **notes},
    )


def _axes(name: str, shape: Sequence[int | None]) -> tuple[int | str, ...]:
    return tuple(
        size if size is not None else BATCH_AXIS if axis == 0 else f"{name}_{axis}"
        for axis, size in enumerate(shape)
    )


def _reference(
    tf: Any, function: FlatFunction
) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    def compute(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = [tf.constant(arrays[port.name], dtype=tf.as_dtype(port.dtype)) for port in function.inputs]
        values = function.call(tensors)
        return {name: np.asarray(value) for name, value in zip(function.output_names, values, strict=True)}

    return compute


@contextmanager
def _native_stderr_held(source: Path) -> Iterator[None]:
    """Keep what C++ code writes to file descriptor 2 off the terminal; TF_CPP_MIN_LOG_LEVEL is read too late."""
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
