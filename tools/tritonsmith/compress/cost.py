"""What a model costs: its parameters, and the floating-point operations of one sample.

Parameters are the elements of the weights that are stored, each stored tensor once however it is read
(Cast, Reshape, DequantizeLinear, ...). A quantized weight counts like a float one, also where two share a
byte. The moving mean and variance of BatchNormalization count. Scales and zero points, scalars, and what is
no number to compute with (shapes, indices, strings) do not. A scale is what an operator takes as one, what
multiplies a scale made by DynamicQuantizeLinear, and the smaller of two constants joined element by element.

FLOPs are twice the multiply-adds of convolutions, matrix products, Einsum, Attention and recurrent layers, in
floating point or integers alike. Biases, normalisation, activations, softmax and pooling are not counted;
they are the usual one to three per cent. Graphs inside If, Loop and Scan count once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from tritonsmith.artifact import BATCH_AXIS, Artifact
from tritonsmith.compress.graph import nodes_of
from tritonsmith.compress.shapes import DEFAULT_LENGTH, Shape, Shapes, infer_shapes, load_for_shapes
from tritonsmith.samples import Samples

INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
NOT_NUMBERS = (onnx.TensorProto.STRING, onnx.TensorProto.BOOL)
# Positions of scales and zero points among the inputs.
QUANTIZATION_INPUTS: Mapping[str, tuple[int, ...]] = {
    "ConvInteger": (2, 3),
    "DequantizeLinear": (1, 2),
    "DynamicQuantizeLSTM": (8, 9, 10, 11),
    "DynamicQuantizeMatMul": (2, 3),
    "GatherBlockQuantized": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "MatMulNBits": (2, 3, 4),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QuantizeLinear": (1, 2),
}
# INT32 is a weight only as a quantized bias, at these positions.
BIAS_INPUTS: Mapping[str, tuple[int, ...]] = {
    "DequantizeLinear": (0,),
    "QGemm": (6,),
    "QLinearConv": (8,),
}
# Where the left and right operands of a product lie among the inputs.
CONVOLUTIONS = {"Conv": (0, 1), "FusedConv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3)}
GEMMS = {"FusedGemm": (0, 1), "Gemm": (0, 1), "QGemm": (0, 3)}
PRODUCTS = {
    **dict.fromkeys(("DynamicQuantizeMatMul", "FusedMatMul", "MatMul", "MatMulInteger"), (0, 1)),
    "MatMulIntegerToFloat": (0, 1),
    "QLinearMatMul": (0, 3),
}
ELEMENTWISE = ("Add", "Div", "Mul", "Sub")
GATES = {"GRU": 3, "LSTM": 4, "DynamicQuantizeLSTM": 4, "RNN": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Parameters of a model and FLOPs of one sample."""

    parameters: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """One node's FLOPs, and the parameters that it is the first to read."""

    name: str
    op_type: str
    parameters: int
    flops: int


def cost_of(
    path: Path, *, lengths: Mapping[str, int] | None = None, default_length: int = DEFAULT_LENGTH
) -> Cost:
    """The cost of a model file of any size; weights are not read.

    Free axes other than the batch have the length that `lengths` gives their name, else `default_length`.

    Raises:
        CompressionError: a shape that FLOPs depend on cannot be inferred.
    """
    return total(costs_of(path, lengths=lengths, default_length=default_length))


def lengths_in(samples: Samples | None, artifact: Artifact) -> dict[str, int]:
    """The lengths that the free axes of an artifact's inputs have in the samples, the batch axis left out."""
    if samples is None:
        return {}
    first = 0 if artifact.batched else 1  # samples are always counted on the first axis
    return {
        axis: samples.arrays[spec.name].shape[first + place]
        for spec in artifact.inputs
        for place, axis in enumerate(spec.shape)
        if isinstance(axis, str) and axis != BATCH_AXIS
    }


def costs_of(
    path: Path, *, lengths: Mapping[str, int] | None = None, default_length: int = DEFAULT_LENGTH
) -> tuple[NodeCost, ...]:
    """The same for each node, in the order of the graph."""
    model = load_for_shapes(path)
    return node_costs(model, infer_shapes(model, lengths=lengths, default_length=default_length))


def node_costs(model: onnx.ModelProto, shapes: Shapes) -> tuple[NodeCost, ...]:
    """Costs of a model in memory, with its shapes from `infer_shapes`."""
    owned = _parameters_by_node(model.graph, _scales(model.graph, shapes))
    return tuple(
        NodeCost(
            name=node.name or node.output[0],
            op_type=node.op_type,
            parameters=owned.get(index, 0),
            flops=flops_of(node, shapes),
        )
        for index, node in enumerate(nodes_of(model.graph))
    )


def total(costs: tuple[NodeCost, ...]) -> Cost:
    return Cost(parameters=sum(cost.parameters for cost in costs), flops=sum(cost.flops for cost in costs))


def flops_of(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Twice the multiply-adds of one node; 0 for what is no product."""

    def shape(index: int) -> Shape:
        return shapes.of(node.input[index], node)

    kind = node.op_type
    if kind in CONVOLUTIONS:
        weight = shape(CONVOLUTIONS[kind][1])  # [O, I / group, ...]
        return 2 * math.prod(shapes.of(node.output[0], node)) * math.prod(weight[1:])
    if kind == "ConvTranspose":
        return 2 * math.prod(shape(0)) * math.prod(shape(1)[1:])  # [I, O / group, ...]
    if kind in GEMMS:
        left, right = (shape(index) for index in GEMMS[kind])
        width = right[0] if _integer(node, "transB", 0) else right[1]
        return 2 * math.prod(left) * width
    if kind == "MatMulNBits":
        return 2 * math.prod(shape(0)) * _integer(node, "N", 0)
    if kind in PRODUCTS:
        return _product_flops(node, shape(PRODUCTS[kind][0]), shapes)
    if kind in GATES:
        return _recurrent_flops(node, shape(0))
    if kind == "Einsum":
        return _einsum_flops(node, [shape(index) for index in range(len(node.input))])
    if kind == "Attention" and node.domain == "":
        return _attention_flops(node, shape(0), shape(1), shape(2))
    return 0


def _product_flops(node: onnx.NodeProto, left: Shape, shapes: Shapes) -> int:
    depth = left[-2] if _integer(node, "transA", 0) and len(left) > 1 else left[-1]
    return 2 * math.prod(shapes.of(node.output[0], node)) * depth


def _recurrent_flops(node: onnx.NodeProto, inputs: Shape) -> int:
    hidden = _integer(node, "hidden_size", 0)
    directions = 2 if any(item.s == b"bidirectional" for item in node.attribute) else 1
    steps = inputs[0] * inputs[1]
    return 2 * steps * directions * GATES[node.op_type] * hidden * (inputs[2] + hidden)


def _einsum_flops(node: onnx.NodeProto, operands: list[Shape]) -> int:
    """Each step of a sum of products over all letters: exact for two operands, an upper bound for more."""
    equation = next(item.s.decode() for item in node.attribute if item.name == "equation").replace(" ", "")
    sizes: dict[str, int] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        middle = len(operand) - len(before) - len(after) if dots else 0
        letters = [*before, *(f".{middle - index}" for index in range(middle)), *after]
        for letter, size in zip(letters, operand, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return (2 if len(operands) > 1 else 0) * math.prod(sizes.values())


def _attention_flops(node: onnx.NodeProto, query: Shape, key: Shape, value: Shape) -> int:
    """Both products of scaled dot-product attention; operands [B, H, S, D] or [B, S, H * D]."""
    if len(query) == 4:
        batch, heads, length, depth = query
        return 2 * batch * heads * length * key[2] * (depth + value[3])
    heads = _integer(node, "q_num_heads", 1)
    per_head = query[2] // heads + value[2] // _integer(node, "kv_num_heads", heads)
    return 2 * query[0] * heads * query[1] * key[1] * per_head


def parameters_of(model: onnx.ModelProto, shapes: Shapes) -> dict[str, int]:
    """How many parameters each initializer counts as; those that count as none are left out."""
    scales = _scales(model.graph, shapes)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in scales}
    counts: dict[str, int] = {}
    for node in nodes_of(model.graph):
        for place, name in enumerate(node.input):
            if name in tensors and name not in counts and (count := _parameters(tensors[name], node, place)):
                counts[name] = count
    return counts


def _scales(graph: onnx.GraphProto, shapes: Shapes) -> set[str]:
    """Scales and zero points that ordinary operators apply."""
    constants = {tensor.name for tensor in _weights(graph)}
    dynamic: set[str] = set()
    scales = set()
    for node in graph.node:
        given = [name for name in node.input if name]
        if node.op_type == "DynamicQuantizeLinear":
            dynamic.add(node.output[1])
        elif node.op_type in ELEMENTWISE and dynamic & set(given):
            scales |= set(given) & constants
        elif node.op_type in ELEMENTWISE and set(given) <= constants:
            scales.add(min(given, key=lambda name: math.prod(shapes.of(name, node))))
        if set(given) <= constants and node.op_type not in PRODUCTS:
            constants |= set(node.output)
    return scales


def _parameters_by_node(graph: onnx.GraphProto, scales: set[str]) -> dict[int, int]:
    """How many parameters each node, by its place in `nodes_of`, is the first to read."""
    tensors = {tensor.name: tensor for tensor in _weights(graph) if tensor.name not in scales}
    owned: dict[int, int] = {}
    for index, node in enumerate(nodes_of(graph)):
        if node.op_type == "Constant":
            continue
        for place, name in enumerate(node.input):
            if name in tensors and (count := _parameters(tensors[name], node, place)):
                owned[index] = owned.get(index, 0) + count
                del tensors[name]
    return owned


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.type == onnx.AttributeProto.TENSOR:
                tensor = onnx.TensorProto(dims=attribute.t.dims, data_type=attribute.t.data_type)
                tensor.name = node.output[0]
                yield tensor
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from attribute.g.initializer


def _parameters(tensor: onnx.TensorProto, node: onnx.NodeProto, place: int) -> int:
    if not tensor.dims or tensor.data_type in NOT_NUMBERS:
        return 0
    if place in QUANTIZATION_INPUTS.get(node.op_type, ()):
        return 0
    if tensor.data_type in INTEGERS and place not in BIAS_INPUTS.get(node.op_type, ()):
        return 0
    if node.op_type == "MatMulNBits" and place == 1:
        return _integer(node, "K", 0) * _integer(node, "N", 0)
    count: int = math.prod(tensor.dims)
    packed = node.op_type == "GatherBlockQuantized" and tensor.data_type == onnx.TensorProto.UINT8
    return count * (8 // _integer(node, "bits", 4)) if packed else count


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)
