"""TensorRT's dialect: symmetric INT8 on the inputs of what it fuses, float biases, nothing on outputs.

NVIDIA's "Working with Quantized Types" asks for it: Q/DQ before convolutions, matrix products and pooling,
and on the branch of a residual Add that is not the convolution's, so that both fuse into one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tritonsmith.compress.graph import constants_of, drop_unused

Range = tuple[float, float]

LARGEST = 127
SMALLEST_SIDE = 16  # matrix products with K or N below it are faster in floating point
CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("Gemm", "MatMul")
POOLING = ("AveragePool", "GlobalAveragePool", "MaxPool")


def write_tensorrt(
    model: onnx.ModelProto, ranges: Mapping[str, Range], *, spared: frozenset[str]
) -> onnx.ModelProto:
    """Put Q/DQ pairs and INT8 weights into `model`; nodes named in `spared` stay as they are.

    Weights are stored in INT8 behind a DequantizeLinear, per output channel; activations have one scale a
    tensor, the larger magnitude of their range over 127.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = constants_of(graph)
    quantized: set[str] = set()
    added: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.name in spared:
            continue
        axis = _weight_axis(node, weights)
        if axis is not None:
            quantized.add(node.name)
            _read_int8_weight(graph, node, weights[node.input[1]], axis, added)
            _read_pair(graph, node, 0, ranges, added)
        elif node.op_type in POOLING:
            _read_pair(graph, node, 0, ranges, added)
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Add" and node.name not in spared and not constants & set(node.input):
            branch = _residual(node, makers, quantized)
            if branch is not None:
                _read_pair(graph, node, branch, ranges, added)
    _insert(graph, added)
    drop_unused(graph)
    return model


def _weight_axis(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> int | None:
    """The output channels' axis of the node's weights; None where the node stays in floating point."""
    if node.op_type not in (*CONVOLUTIONS, *PRODUCTS) or node.input[1] not in weights:
        return None
    weight = weights[node.input[1]]
    if weight.data_type != onnx.TensorProto.FLOAT or not weight.dims:
        return None
    if node.op_type in CONVOLUTIONS:
        return 0 if node.op_type == "Conv" else 1
    if len(weight.dims) != 2 or min(weight.dims) < SMALLEST_SIDE:
        return None
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else 1


def _residual(add: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], quantized: set[str]) -> int | None:
    """Which input of an Add is the branch beside a quantized convolution's result."""
    for index, name in enumerate(add.input):
        maker = makers.get(name)
        if maker is not None and maker.op_type in CONVOLUTIONS and maker.name in quantized:
            return 1 - index
    return None


def _read_pair(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    index: int,
    ranges: Mapping[str, Range],
    added: dict[str, list[onnx.NodeProto]],
) -> None:
    name = node.input[index]
    if name not in ranges:
        return
    if name not in added:
        scale = _scale(max(abs(bound) for bound in ranges[name]))
        parts = [f"{name}_scale", f"{name}_zero_point"]
        graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), parts[0]))
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), parts[1]))
        added[name] = [
            helper.make_node("QuantizeLinear", [name, *parts], [f"{name}_int8"], f"{name}_QuantizeLinear"),
            helper.make_node(
                "DequantizeLinear", [f"{name}_int8", *parts], [f"{name}_dq"], f"{name}_DequantizeLinear"
            ),
        ]
    node.input[index] = f"{name}_dq"


def _read_int8_weight(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    weight: onnx.TensorProto,
    axis: int,
    added: dict[str, list[onnx.NodeProto]],
) -> None:
    key = f"{weight.name}_dq{axis}"
    if key not in added:
        values, scales = quantize_weight(numpy_helper.to_array(weight), axis)
        names = [
            f"{weight.name}_int8_{axis}",
            f"{weight.name}_scale_{axis}",
            f"{weight.name}_zero_point_{axis}",
        ]
        arrays: list[NDArray[Any]] = [values, scales, np.zeros(len(scales), np.int8)]
        for name, array in zip(names, arrays, strict=True):
            graph.initializer.append(numpy_helper.from_array(array, name))
        added[key] = [
            helper.make_node("DequantizeLinear", names, [key], f"{weight.name}_DequantizeLinear", axis=axis)
        ]
    node.input[1] = key


def quantize_weight(array: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 values of `array` and one scale for each index of `axis`."""
    rest = tuple(other for other in range(array.ndim) if other != axis)
    largest = np.abs(array).max(axis=rest)
    scales = np.array([_scale(float(value)) for value in largest], np.float32)
    shape = [-1 if other == axis else 1 for other in range(array.ndim)]
    values = np.rint(array / scales.reshape(shape))
    return np.clip(values, -LARGEST, LARGEST).astype(np.int8), scales


def _scale(largest: float) -> float:
    """Of a tensor that is always zero, 1: a scale of zero would make NaN."""
    return largest / LARGEST if largest / LARGEST >= np.finfo(np.float32).tiny else 1.0


def _insert(graph: onnx.GraphProto, added: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Put the new nodes in front, or right behind what makes their input."""
    made = {name for node in graph.node for name in node.output}
    first = [node for key, nodes in added.items() if key not in made for node in nodes]
    nodes = list(first)
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            nodes.extend(added.get(name, []))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
