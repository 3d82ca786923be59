"""What a parsed network holds: its inputs, and the precisions that its graph names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tritonsmith.artifact import TensorSpec
from tritonsmith.engines.tensorrt.versions import Capabilities
from tritonsmith.errors import PlanError

# trt.DataType or numpy's name -> precision; all others (indices, booleans) are none
PRECISIONS = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "FP8": "fp8",
    "INT4": "int4",
    "float32": "fp32",
    "float16": "fp16",
    "int8": "int8",
}


def precisions_in(trt: ModuleType, network: Any, capabilities: Capabilities) -> frozenset[str]:
    """The precisions that the graph names: of its tensors, casts, weights and QuantizeLinear nodes."""
    names = {network.get_input(index).dtype.name for index in range(network.num_inputs)}
    for index in range(network.num_layers):
        names.update(_names_in(trt, network.get_layer(index), capabilities))
    return frozenset(PRECISIONS[name] for name in names if name in PRECISIONS)


def check_precision(precision: str, held: Collection[str], onnx: Path) -> None:
    """Raise PlanError where the file is not of the precision that it is said to be."""
    if precision not in held:
        raise PlanError(
            f"{onnx} is built as {precision}, but its graph holds no {precision} tensor",
            found=", ".join(sorted(held)) or "none",
            fix="precision lives in the graph: cast or quantize the file first",
        )


def check_inputs(network: Any, inputs: Sequence[TensorSpec], onnx: Path) -> None:
    """Raise PlanError where the network's inputs are not those that the profiles were made for."""
    found = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    if sorted(found) != sorted(spec.name for spec in inputs):
        raise PlanError(
            f"{onnx} has other inputs than its signature",
            found=", ".join(sorted(found)),
            expected=", ".join(sorted(spec.name for spec in inputs)),
        )
    for spec in inputs:
        tensor = found[spec.name]
        if tensor.is_shape_tensor:
            raise PlanError(
                f"the values of input {spec.name!r} of {onnx} set the shape of other tensors",
                expected="inputs whose values are only computed with",
                fix="export the model with these shapes fixed, or serve it with ONNX Runtime",
            )
        shape = tuple(tensor.shape)
        free = tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape)
        if len(shape) != len(free) or any(
            axis not in (-1, wanted) for axis, wanted in zip(shape, free, strict=True)
        ):
            raise PlanError(
                f"input {spec.name!r} of {onnx} has another shape", found=list(shape), expected=spec
            )


def _names_in(trt: ModuleType, layer: Any, capabilities: Capabilities) -> Iterator[str]:
    for index in range(layer.num_outputs):
        if (tensor := layer.get_output(index)) is not None:
            yield tensor.dtype.name
    if capabilities.strongly_typed:
        return
    # 8.6 settles the types of inner tensors only while it builds: ask what names them in the graph
    if layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE):
        yield "INT8"
    elif layer.type == trt.LayerType.CAST:
        layer.__class__ = trt.ICastLayer  # the binding hands out the base class
        yield layer.to_type.name
    elif layer.type == trt.LayerType.CONSTANT:
        layer.__class__ = trt.IConstantLayer
        yield layer.weights.dtype.name
