"""A TensorFlow function on flat lists of tensors, exported to ONNX by tf2onnx."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec, tool_versions
from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported, Reference
from tritonsmith.ingest.tensorflow_framework import first_line, import_framework
from tritonsmith.ingest.tensorflow_onnx import NEWEST_OPSET, onnx_from_concrete
from tritonsmith.onnx_model import save_model

Shape = tuple[int | None, ...]

TOOLS = ("tensorflow", "tensorflow-cpu", "keras", "tf-keras", "tf2onnx")
# Sizes of images and volumes that networks take, by rank, then by axis: some odd ones, since there an
# output may be larger than its input; and none, for networks that join what they have halved five times.
ODD_LENGTHS = {
    4: ((97, 128, 160, 96), (128, 97, 96, 160)),
    5: ((33, 16, 32, 16), (64, 33, 32, 32), (32, 64, 33, 32)),
}
EVEN_LENGTHS = {
    4: ((96, 128, 160, 96), (128, 96, 96, 160)),
    5: ((32, 16, 32, 16), (64, 32, 32, 32), (32, 64, 32, 32)),
}
# Parts of the names of operations that reach out of the graph: to files, to Python, to other machines.
OUTSIDE = ("File", "PyFunc", "Reader", "Remote", "DebugIdentity")
# How a SavedModel restores its own variables.
OF_THE_SAVER = frozenset({"ShardedFilename", "MergeV2Checkpoints"})


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
    refuse_outside(function.source, concrete.graph.as_graph_def())
    opset = min(options.opset or NEWEST_OPSET, NEWEST_OPSET)
    raw = folder / "raw.onnx"
    save_model(onnx_from_concrete(function.source, concrete, opset), raw)
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
        lengths=_image_lengths(tf, function),
    )


def refuse_outside(source: Path, graph: Any) -> None:
    """Raise SourceError where a GraphDef would reach out of itself when it is run, be it to compare."""
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    outside = {
        node.op for node in nodes if any(part in node.op for part in OUTSIDE) and node.op not in OF_THE_SAVER
    }
    outside |= {node.op for node in nodes if node.attr["output_stream"].s.startswith(b"file:")}
    if outside:
        raise SourceError(
            f"{source} reaches out of its graph, to files or to Python",
            found=", ".join(sorted(outside)),
            expected="a model that only computes",
            fix="save the part of the model that computes, without these operations",
        )


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


def _image_lengths(tf: Any, function: FlatFunction) -> dict[str, tuple[int, ...]]:
    """Lengths to try for the free axes of images and volumes, by axis.

    Where an image is smaller than a kernel, TensorFlow gives nothing and ONNX Runtime an error.
    """
    odd, even = (_lengths_of(function.inputs, table) for table in (ODD_LENGTHS, EVEN_LENGTHS))
    if not odd:
        return {}
    try:
        for draw in range(3):
            function.call([_zeros(tf, port, odd, draw) for port in function.inputs])
    except Exception:  # noqa: BLE001 - whatever it is, the source does not take odd sizes
        return even
    return odd


def _lengths_of(
    ports: tuple[Port, ...], table: Mapping[int, tuple[tuple[int, ...], ...]]
) -> dict[str, tuple[int, ...]]:
    return {
        f"{port.name}_{axis}": table[len(port.shape)][axis - 1]
        for port in ports
        for axis, length in enumerate(port.shape)
        if length is None and 0 < axis < len(port.shape) - 1 and len(port.shape) in table
    }


def _zeros(tf: Any, port: Port, lengths: Mapping[str, tuple[int, ...]], draw: int) -> Any:
    shape = [
        length
        if length is not None
        else lengths[name][draw]
        if (name := f"{port.name}_{axis}") in lengths
        else 1
        for axis, length in enumerate(port.shape)
    ]
    return tf.zeros(shape, tf.as_dtype(port.dtype))


def _reference(tf: Any, function: FlatFunction) -> Reference:
    def compute(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = [tf.constant(arrays[port.name], dtype=tf.as_dtype(port.dtype)) for port in function.inputs]
        answers = [np.asarray(value) for value in function.call(tensors)]
        return dict(zip(function.output_names, answers, strict=True))

    return compute
