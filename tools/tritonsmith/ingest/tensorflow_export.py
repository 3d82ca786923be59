"""A TensorFlow function on flat lists of tensors, exported to ONNX by tf2onnx."""

from __future__ import annotations

import importlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec, tool_versions
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported, Reference
from tritonsmith.onnx_model import save_model

Shape = tuple[int | None, ...]

NEWEST_OPSET = 18  # that tf2onnx 1.17 writes
TOOLS = ("tensorflow", "tensorflow-cpu", "keras", "tf-keras", "tf2onnx")
ERROR_LINE = re.compile(r"\w*(Error|Exception)\b.*: ")
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LOGGERS = ("tensorflow", "absl", "tf2onnx")
# Operations that reach out of the graph: a model is not run, not even to compare, where it holds one.
OUTSIDE_WORDS = ("File", "PyFunc", "SaveV2", "RestoreV2", "Checkpoint", "Socket", "RemoteCall")


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An input of a source; None is an axis that is free."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatFunction:
    """What a source computes, on lists of tensors in the order of its names.

    `while_traced` surrounds the export alone: a source may take another form there.
    """

    source: Path
    inputs: tuple[Port, ...]
    output_names: tuple[str, ...]
    call: Callable[[list[Any]], list[Any]]
    while_traced: Callable[[], AbstractContextManager[None]] = nullcontext


def import_framework(name: str, source: Path) -> Any:
    """Import tensorflow, keras, tf_keras or tf2onnx, on the TensorFlow backend and without their noise.

    Raises:
        MissingExtraError: it is not installed.
        SourceError: it is broken, or Keras already runs on another backend in this process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        with _native_stderr_held(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own deprecations
            importlib.import_module("tensorflow")
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise MissingExtraError(f"cannot read {source}", package=package, extra="keras") from error
    except ImportError as error:
        raise SourceError(
            f"cannot read {source}", found=f"{name} is broken: {first_line(error)}", fix=f"reinstall {name}"
        ) from error
    for logger in LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    if name == "keras" and (backend := module.backend.backend()) != "tensorflow":
        raise SourceError(
            f"cannot read {source}",
            found=f"Keras runs on {backend} in this process",
            expected="the TensorFlow backend",
            fix="set KERAS_BACKEND=tensorflow, and import keras nowhere before",
        )
    return module


def export_flat(
    function: FlatFunction, folder: Path, options: ConvertOptions, *, kind: str, notes: Mapping[str, Json]
) -> Exported:
    """Trace `function`, write `raw.onnx` into `folder`, and say what goes in and out.

    Raises:
        SourceError: TensorFlow cannot trace it, it reaches for files or Python, or tf2onnx cannot
            convert one of its operations.
    """
    tf = import_framework("tensorflow", function.source)
    concrete = _trace(tf, function)
    _refuse_outside(function.source, concrete)
    opset = min(options.opset or NEWEST_OPSET, NEWEST_OPSET)
    raw = folder / "raw.onnx"
    save_model(_convert(function.source, concrete, opset), raw)
    inputs = tuple(_spec(port.name, port.dtype, port.shape) for port in function.inputs)
    outputs = _output_specs(function, concrete)
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


def first_line(error: BaseException) -> str:
    """The part of an error's message that says most, cut to a readable length."""
    text = ANSI_COLOUR.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0] == "in user code:":  # AutoGraph puts the source lines before the error's own
        lines = [line for line in lines if ERROR_LINE.match(line)] or lines
        return lines[0][:300]
    if lines[0].startswith("Exception encountered when calling"):  # Keras says where first, then what
        return " ".join([f"{type(error).__name__}:", *lines[:2]])[:300]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _trace(tf: Any, function: FlatFunction) -> Any:
    """The function as a TensorFlow graph; tensors are named by their place."""
    signature = [
        tf.TensorSpec(port.shape, tf.as_dtype(port.dtype), name=f"input_{index:03d}")
        for index, port in enumerate(function.inputs)
    ]

    def compute(*tensors: Any) -> dict[str, Any]:
        outputs = function.call(list(tensors))
        return {f"output_{index:03d}": tf.identity(value) for index, value in enumerate(outputs)}

    try:
        with function.while_traced():
            return tf.function(compute, input_signature=signature).get_concrete_function()
    except Exception as error:
        raise SourceError(
            f"{function.source} cannot be traced by TensorFlow", found=first_line(error)
        ) from error


def _refuse_outside(source: Path, concrete: Any) -> None:
    graph = concrete.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    if outside := sorted({node.op for node in nodes if any(word in node.op for word in OUTSIDE_WORDS)}):
        raise SourceError(
            f"{source} reaches out of its graph, to files or to Python",
            found=", ".join(outside),
            expected="a model that only computes",
            fix="save the part of the model that computes, without these operations",
        )


def _output_specs(function: FlatFunction, concrete: Any) -> tuple[TensorSpec, ...]:
    structured = concrete.structured_outputs
    specs = []
    for name, key in zip(function.output_names, sorted(structured), strict=True):
        tensor = structured[key]
        if tensor.dtype.name not in dtypes.BY_NAME:
            raise SourceError(
                f"{function.source}: output {name!r} has a data type that Triton cannot serve",
                found=tensor.dtype.name,
            )
        if tensor.shape.rank is None:
            raise SourceError(
                f"{function.source}: output {name!r} has no rank",
                fix="give it one in the model, for example with tf.ensure_shape",
            )
        specs.append(_spec(name, tensor.dtype.name, tuple(tensor.shape)))
    return tuple(specs)


def _spec(name: str, dtype: str, shape: Shape) -> TensorSpec:
    """A free axis 0 is the batch; other free axes have no name in TensorFlow."""
    axes = (
        length if length is not None else BATCH_AXIS if axis == 0 else f"{name}_{axis}"
        for axis, length in enumerate(shape)
    )
    return TensorSpec(name=name, dtype=dtype, shape=tuple(axes))


def _convert(source: Path, concrete: Any, opset: int) -> onnx.ModelProto:
    """The frozen function as ONNX.

    Not by tf2onnx's `from_function`, which takes constants that a function captured for inputs.
    """
    tf2onnx = import_framework("tf2onnx", source)
    model: onnx.ModelProto
    try:
        with _warnings_held():
            frozen = _freeze(concrete)
            model, _ = tf2onnx.convert.from_graph_def(
                _without_xla(frozen.graph.as_graph_def(add_shapes=True)),
                input_names=[tensor.name for tensor in frozen.inputs],
                output_names=[tensor.name for tensor in frozen.outputs],
                opset=opset,
                custom_op_handlers={"Erfc": (_erfc, []), "Expm1": (_expm1, [])},
            )
    except Exception as error:
        raise SourceError(
            f"{source} cannot be converted to ONNX by tf2onnx", found=first_line(error)
        ) from error
    if unknown := sorted(_unknown_operators(model.graph, opset)):
        raise SourceError(
            f"{source} uses TensorFlow operations that tf2onnx cannot convert",
            found=", ".join(unknown),
            fix="move them out of the model, for example into a Python stage before or after it",
        )
    return model


def _freeze(concrete: Any) -> Any:
    """The function with its variables and captured tensors as constants, loops kept as they are."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(concrete, lower_control_flow=False, aggressive_inlining=True)


def _without_xla(graph: Any) -> Any:
    """The graph without the marks that keep a call whole; Keras 3 sets them around grouped convolutions."""
    for node in (*graph.node, *(node for function in graph.library.function for node in function.node_def)):
        node.attr.pop("_XlaMustCompile", None)
    for function in graph.library.function:
        for mark in ("_XlaMustCompile", "_noinline"):
            function.attr.pop(mark, None)
    return graph


def _erfc(context: Any, node: Any, name: str, arguments: Any) -> None:
    """erfc(x) is 1 - erf(x); exact GELU is made of it, and tf2onnx 1.17 does not know it."""
    del name, arguments
    (erfc,) = node.output
    data_type, shape = context.get_dtype(erfc), context.get_shape(erfc)
    context.remove_node(node.name)
    erf = context.make_node("Erf", node.input, dtypes=[data_type], shapes=[shape])
    one = _one(context, node.name, data_type)
    context.make_node("Sub", [one, erf.output[0]], outputs=[erfc], dtypes=[data_type], shapes=[shape])


def _expm1(context: Any, node: Any, name: str, arguments: Any) -> None:
    """expm1(x) is exp(x) - 1, a hair less exact near zero; CELU is made of it."""
    del name, arguments
    (expm1,) = node.output
    data_type, shape = context.get_dtype(expm1), context.get_shape(expm1)
    context.remove_node(node.name)
    exp = context.make_node("Exp", node.input, dtypes=[data_type], shapes=[shape])
    one = _one(context, node.name, data_type)
    context.make_node("Sub", [exp.output[0], one], outputs=[expm1], dtypes=[data_type], shapes=[shape])


def _one(context: Any, prefix: str, data_type: int) -> str:
    value = np.array(1, onnx.helper.tensor_dtype_to_np_dtype(data_type))
    return str(context.make_const(f"{prefix}_one", value).output[0])


def _unknown_operators(graph: onnx.GraphProto, opset: int) -> set[str]:
    unknown = set()
    for node in graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, opset):
            unknown.add(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                unknown |= _unknown_operators(attribute.g, opset)
    return unknown


def _reference(tf: Any, function: FlatFunction) -> Reference:
    def compute(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = [tf.constant(arrays[port.name], dtype=tf.as_dtype(port.dtype)) for port in function.inputs]
        answers = [np.asarray(value) for value in function.call(tensors)]
        return dict(zip(function.output_names, answers, strict=True))

    return compute


@contextmanager
def _warnings_held() -> Iterator[None]:
    """Keep back what tf2onnx logs through the root logger: it is about its own optimisations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _native_stderr_held() -> Iterator[None]:
    """Keep what C++ code prints while it is imported off the terminal; no setting reaches it so early."""
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
