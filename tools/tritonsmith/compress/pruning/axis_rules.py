"""How channel ids pass through each operator; see `axes.py`.

A rule reads the labels of a node's inputs, joins or freezes ids, and writes the labels of its outputs. It
also notes what has to be rewritten in the node once channels are gone. Here are the table of all rules and
those that compute element by element or over an axis; `axis_moves.py` and `axis_products.py` have the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from tritonsmith.compress.pruning import axis_moves as moves
from tritonsmith.compress.pruning import axis_products as products
from tritonsmith.compress.pruning.axes import Ids, Labels, Walk, attribute_of, is_unread, label_of, listed

Rule = Callable[[Walk, onnx.NodeProto], None]

POINTWISE = (
    *("Abs", "Acos", "Asin", "Atan", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu"),
    *("Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin"),
    *("Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
ELEMENTWISE = (
    *("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where"),
    "Xor",
)
REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
SHAPE_ONLY = ("ConstantOfShape", "Range", "Shape", "Size")


def pass_on(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    for name in filter(None, node.output):
        walk.write(name, labels)


def forget(walk: Walk, node: onnx.NodeProto) -> None:
    for name in filter(None, node.output):
        walk.write(name, [None] * len(walk.shape(name, node)))


def join_operands(walk: Walk, node: onnx.NodeProto) -> None:
    """Operands meet position by position; axes of length 1 broadcast."""
    _broadcast(walk, node, list(filter(None, node.input)), node.output[0])


def _broadcast(walk: Walk, node: onnx.NodeProto, names: list[str], output: str) -> None:
    out = walk.shape(output, node)
    result: list[Ids | None] = []
    for back in range(len(out), 0, -1):
        meeting = []
        for name in names:
            shape = walk.shape(name, node)
            if len(shape) >= back and shape[-back] > 1:
                meeting.append(walk.read(name, node)[-back])
        axis = meeting[0] if meeting else None
        for other in meeting[1:]:
            axis = walk.tie(axis, other, node)
        result.append(axis)
    walk.write(output, result)


def normalise_over(walk: Walk, node: onnx.NodeProto) -> None:
    """Softmax and its like: the axis that is normalised stays."""
    labels = list(walk.read(node.input[0], node))
    first = attribute_of(node, "axis", -1 if walk.opset >= 13 else 1) % len(labels)
    several = walk.opset < 13 and node.op_type in ("Hardmax", "LogSoftmax", "Softmax")
    for axis in range(first, len(labels)) if several else [first]:
        walk.freeze(labels[axis], f"{label_of(node)} computes over it")
    walk.write(node.output[0], labels)


def normalise_layer(walk: Walk, node: onnx.NodeProto) -> None:
    """LayerNormalization: the mean of fewer channels is another mean, so they stay."""
    labels = walk.read(node.input[0], node)
    first = attribute_of(node, "axis", -1) % len(labels)
    for axis in range(first, len(labels)):
        walk.freeze(labels[axis], f"{label_of(node)} takes the mean over it")
        for name in filter(None, node.input[1:]):
            back = len(labels) - axis
            shape = walk.shape(name, node)
            if len(shape) >= back and shape[-back] > 1:
                walk.tie(labels[axis], walk.read(name, node)[-back], node)
    for name in filter(None, node.output[1:]):
        walk.write(name, [None] * len(walk.shape(name, node)))
    walk.write(node.output[0], labels)


def normalise_channels(walk: Walk, node: onnx.NodeProto) -> None:
    """BatchNormalization and InstanceNormalization: one number of each vector for each channel."""
    labels = list(walk.read(node.input[0], node))
    if walk.shape(node.input[0], node)[1] > 1:
        for name in filter(None, node.input[1:]):
            labels[1] = walk.tie(labels[1], walk.read(name, node)[0], node)
    for name in filter(None, node.output[1:]):
        walk.write(name, [None] * len(walk.shape(name, node)))
    walk.write(node.output[0], labels)


def reduce(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    axes = listed(walk, node, 1, "axes")
    if axes is None and is_unread(node, 1, walk):
        walk.freeze_all(node, f"{label_of(node)} computes its axes")
        return
    if not axes:
        axes = [] if attribute_of(node, "noop_with_empty_axes", 0) else list(range(len(labels)))
    _drop(walk, node, labels, {axis % len(labels) for axis in axes})


def pick_along(walk: Walk, node: onnx.NodeProto) -> None:
    """ArgMax and ArgMin."""
    labels = walk.read(node.input[0], node)
    _drop(walk, node, labels, {attribute_of(node, "axis", 0) % len(labels)})


def _drop(walk: Walk, node: onnx.NodeProto, labels: Labels, axes: set[int]) -> None:
    for axis in axes:
        walk.freeze(labels[axis], f"{label_of(node)} computes over it")
    keeps = attribute_of(node, "keepdims", 1)
    left = [None if axis in axes else label for axis, label in enumerate(labels) if keeps or axis not in axes]
    walk.write(node.output[0], left)


def pool(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    for axis in labels[2:]:
        walk.freeze(axis, f"{label_of(node)} pools over it")
    if len(node.output) > 1 and node.output[1] in walk.readers:
        walk.freeze(labels[1], f"{label_of(node)} gives places that count channels")
    for name in filter(None, node.output):
        walk.write(name, (*labels[:2], *[None] * (len(labels) - 2)))


def dequantize(walk: Walk, node: onnx.NodeProto) -> None:
    """QuantizeLinear and DequantizeLinear: a scale for each channel goes with it."""
    labels = list(walk.read(node.input[0], node))
    for name in filter(None, node.input[1:3]):
        shape = walk.shape(name, node)
        if len(shape) > 1:
            walk.freeze_all(node, f"{label_of(node)} scales in blocks")
            return
        if shape and shape[0] > 1:
            axis = attribute_of(node, "axis", 1) % len(labels)
            labels[axis] = walk.tie(labels[axis], walk.read(name, node)[0], node)
    walk.write(node.output[0], labels)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE, pass_on),
    **dict.fromkeys(SHAPE_ONLY, forget),
    **dict.fromkeys(ELEMENTWISE, join_operands),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), moves.reshape),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "LpNormalization", "Softmax"), normalise_over),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), normalise_layer),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), normalise_channels),
    **dict.fromkeys(("ArgMax", "ArgMin"), pick_along),
    **dict.fromkeys(("Pad", "Tile"), moves.same_length),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), moves.move_blocks),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), dequantize),
    **dict.fromkeys(("Resize", "Upsample"), moves.resize),
    "Concat": moves.concatenate,
    "Conv": products.convolve,
    "ConvTranspose": products.convolve_back,
    "Einsum": products.sum_products,
    "Expand": moves.expand,
    "Gather": moves.gather,
    "Gemm": products.multiply_and_add,
    "MatMul": products.multiply,
    "Slice": moves.slice_axes,
    "Split": moves.split,
    "Transpose": moves.transpose,
}
