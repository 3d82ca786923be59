"""Which weights of a graph can be zero, which of them stay, and how many zeros a file really has.

The 2:4 layout is what sparse tensor cores take, as NVIDIA's TensorRT Developer Guide has it under
"Structured Sparsity": of a convolution's weights [K, C, R, S], at least two zeros in every four consecutive
input channels C at each k, r, s; of a matrix product's constant operand, the same along the axis that is
summed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tritonsmith import onnx_model
from tritonsmith.artifact import Json
from tritonsmith.compress.graph import constants_of, nodes_of
from tritonsmith.errors import CompressionError

Array = NDArray[Any]
Mask = NDArray[np.bool_]

FOUR, TWO = 4, 2
FEWEST = 64  # weights of a layer; below, zeros are worth nothing
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


def _flag(node: onnx.NodeProto, name: str) -> bool:
    return any(item.name == name and item.i for item in node.attribute)


# Operator -> input -> the axis of that input over which products are summed.
SUMMED: Mapping[str, Mapping[int, Callable[[onnx.NodeProto], int]]] = {
    "Conv": {1: lambda node: 1},
    "ConvTranspose": {1: lambda node: 0},
    "Gemm": {
        0: lambda node: 0 if _flag(node, "transA") else 1,
        1: lambda node: 1 if _flag(node, "transB") else 0,
    },
    "MatMul": {0: lambda node: -1, 1: lambda node: -2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight that a product reads, and the axis over which the product sums."""

    node: str
    weight: str
    axis: int
    values: Array


def find_layers(
    model: onnx.ModelProto, *, two_of_four: bool, keep: Sequence[str]
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The weights of products, and a line for each that is left alone.

    Raises:
        CompressionError: `keep` names no node.
    """
    nodes = list(nodes_of(model.graph))
    if unknown := sorted(set(keep) - {node.name for node in nodes}):
        named = [node.name for node in nodes if node.op_type in SUMMED]
        raise CompressionError(f"no node is named {unknown[0]!r}", expected=", ".join(named)[:500])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = constants_of(model.graph)
    uses: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in nodes:
        for index, name in enumerate(node.input):
            uses.setdefault(name, []).append((node, index))
    layers, alone = [], []
    for name, readers in uses.items():
        products = [node for node, index in readers if index in SUMMED.get(node.op_type, {})]
        if not products or name not in constants:
            continue
        node = products[0]
        tensor = tensors.get(name)
        reason = _reason_to_leave(readers, tensor, two_of_four=two_of_four, keep=keep)
        if reason is None and tensor is not None:
            axis = _axis(readers[0])
            layers.append(
                Layer(node=node.name or name, weight=name, axis=axis, values=numpy_helper.to_array(tensor))
            )
        else:
            alone.append(f"{node.name or name}: {reason}")
    return tuple(layers), tuple(alone)


def masks_for(
    layers: Sequence[Layer], *, sparsity: float, two_of_four: bool, together: bool
) -> dict[str, Mask]:
    """Which weights stay, by weight name: the largest by absolute value; of equals, the later.

    Raises:
        CompressionError: a layer would be left with nothing.
    """
    if two_of_four:
        return {layer.weight: _two_of_four(layer) for layer in layers}
    if not together:
        return {layer.weight: _largest(layer.values, sparsity) for layer in layers}
    stays = _largest(np.concatenate([layer.values.ravel() for layer in layers]), sparsity)
    masks, start = {}, 0
    for layer in layers:
        part = stays[start : start + layer.values.size].reshape(layer.values.shape)
        masks[layer.weight], start = part, start + layer.values.size
        if not part.any():
            raise CompressionError(
                f"a sparsity of {sparsity:g} over all layers together would empty {layer.node}",
                fix=f"ask for less, take scope=layer, or add {layer.node!r} to `keep`",
            )
    return masks


def write_zeros(model: onnx.ModelProto, masks: Mapping[str, Mask]) -> None:
    """Make the weights that do not stay zeros of the file."""
    for tensor in model.graph.initializer:
        if tensor.name in masks:
            values = numpy_helper.to_array(tensor)
            zeroed = np.where(masks[tensor.name], values, np.zeros((), values.dtype))
            raw = numpy_helper.from_array(zeroed).raw_data
            for field in ("float_data", "double_data", "int32_data"):
                tensor.ClearField(field)
            tensor.raw_data = raw


def measure_zeros(path: Path, layers: Sequence[Layer]) -> dict[str, Json]:
    """What a file really has: zeros of all these layers and of each, and how much of it is 2:4."""
    tensors = {tensor.name: tensor for tensor in onnx_model.load_model(path).graph.initializer}
    shares: dict[str, Json] = {}
    zeros = total = conforming = fours = 0
    for layer in layers:
        values = numpy_helper.to_array(tensors[layer.weight])
        shares[layer.node] = round(float((values == 0).mean()), 4)
        zeros, total = zeros + int((values == 0).sum()), total + values.size
        if values.shape[layer.axis] % FOUR == 0:
            counts = (groups_of_four(values, layer.axis) == 0).sum(-1)
            conforming, fours = conforming + int((counts >= TWO).sum()), fours + counts.size
    return {
        "weights": total,
        "sparsity": round(zeros / total, 4),
        "sparsity_by_layer": shares,
        "two_of_four_share": round(conforming / fours, 4) if fours else None,
    }


def groups_of_four(values: Array, axis: int) -> Array:
    """`[..., 4]`: every four consecutive values along an axis."""
    last = np.moveaxis(values, axis, -1)
    return last.reshape(*last.shape[:-1], last.shape[-1] // FOUR, FOUR)


def _reason_to_leave(
    readers: Sequence[tuple[onnx.NodeProto, int]],
    tensor: onnx.TensorProto | None,
    *,
    two_of_four: bool,
    keep: Sequence[str],
) -> str | None:
    if tensor is None:
        return "its weights are computed from others"
    if tensor.data_type not in FLOATS:
        return "its weights are no floats"
    if any(node.name in keep for node, _ in readers):
        return "it is kept"
    other = next((node for node, index in readers if index not in SUMMED.get(node.op_type, {})), None)
    if other is not None:
        return f"{other.op_type} reads its weights too"
    size = int(np.prod(tensor.dims))
    if size < FEWEST:
        return f"{size} weights are too few"
    if not two_of_four:
        return None
    if any(node.op_type == "ConvTranspose" for node, _ in readers):
        return "sparse tensor cores take no transposed convolution"
    if len(tensor.dims) < TWO or len({_axis(reader) % len(tensor.dims) for reader in readers}) > 1:
        return "its weights are summed over more than one axis"
    length = tensor.dims[_axis(readers[0])]
    return None if length % FOUR == 0 else f"{length} values to sum over are no multiple of {FOUR}"


def _axis(reader: tuple[onnx.NodeProto, int]) -> int:
    node, index = reader
    return SUMMED[node.op_type][index](node)


def _largest(values: Array, sparsity: float) -> Mask:
    stays = np.ones(values.size, dtype=bool)
    order = np.argsort(np.abs(values), axis=None, kind="stable")
    stays[order[: int(sparsity * values.size)]] = False
    return stays.reshape(values.shape)


def _two_of_four(layer: Layer) -> Mask:
    groups = np.abs(groups_of_four(layer.values, layer.axis))
    ranks = np.argsort(np.argsort(groups, axis=-1, kind="stable"), axis=-1)
    moved = np.moveaxis(layer.values, layer.axis, -1).shape
    return np.ascontiguousarray(np.moveaxis((ranks >= TWO).reshape(moved), -1, layer.axis))
