"""Which float constants of a graph are weights that training may change."""

from __future__ import annotations

import numpy as np
import onnx

# Operator -> inputs that hold weights. Elsewhere a float constant is an option of the operator.
PLACES = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1, 2),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
    "Gather": (0,),
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "Div": (0, 1),
    "Concat": tuple(range(64)),
}
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
PASSES_ON = frozenset({"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
HUGE = 1e4  # a mask: nothing that is learned is so large


def trainable_weights(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the initializers that hold weights.

    A single number is one only where it is added to or multiplied with a product, as the bias of a layer
    of one unit is; elsewhere it is an epsilon or a scale.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    return frozenset(
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type in (*floats, onnx.TensorProto.BFLOAT16)
        and not _is_option(tensor)
        and _is_weight(tensor.name, int(np.prod(tensor.dims)), readers, makers)
    )


def _is_option(tensor: onnx.TensorProto) -> bool:
    if len(tensor.dims) == 0:
        return True
    values = onnx.numpy_helper.to_array(tensor).astype(np.float32, copy=False)
    return values.size == 0 or not float(np.abs(values).max()) < HUGE


def _is_weight(
    name: str,
    size: int,
    readers: dict[str, list[tuple[onnx.NodeProto, int]]],
    makers: dict[str, onnx.NodeProto],
) -> bool:
    for node, index in readers.get(name, []):
        if node.op_type in PASSES_ON and index == 0 and _is_weight(node.output[0], size, readers, makers):
            return True
        if index not in PLACES.get(node.op_type, ()):
            continue
        if size > 1 or node.op_type not in ELEMENTWISE:
            return True
        other = makers.get(node.input[1 - index])
        if other is not None and other.op_type in PRODUCTS:
            return True
    return False
