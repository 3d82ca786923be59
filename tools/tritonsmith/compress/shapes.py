"""The shape of every tensor in a graph for one sample, and the values of small constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from tritonsmith import onnx_model
from tritonsmith.artifact import BATCH_AXIS
from tritonsmith.errors import CompressionError

DEFAULT_LENGTH = 128
SMALL_ELEMENTS = 4096  # what takes part in the arithmetic of shapes is not larger
ROUNDS = 64
Shape = tuple[int, ...]

# Operators that shapes are computed by; their results are found by running them.
SHAPE_OPS = frozenset(
    {"Add", "And", "Cast", "CastLike", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor"}
    | {"Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul"}
    | {"Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice"}
    | {"Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
)
GROWING_OPS = frozenset({"ConstantOfShape", "Expand"})  # a few numbers in, any size out
# Operators of com.microsoft that give the shape that a standard operator would give.
STAND_INS = {
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization"), "Identity"),
    **dict.fromkeys(("SkipSimplifiedLayerNormalization", "QLinearSigmoid", "QLinearLeakyRelu"), "Identity"),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), "Identity"),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"), "MatMul"),
    "FusedMatMul": "MatMul",
    "FusedConv": "Conv",
    "FusedGemm": "Gemm",
    "GatherBlockQuantized": "Gather",
    "QGemm": "Gemm",
    "QLinearAdd": "Add",
    "QLinearMul": "Mul",
}
QLINEAR_BINARY = frozenset({"QLinearAdd", "QLinearMul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Shapes by tensor name, weights included, and values by name of what is small and constant.

    A value that follows from the shape of an input holds for this sample's lengths only.
    """

    shapes: Mapping[str, Shape]
    values: Mapping[str, NDArray[Any]]

    def of(self, name: str, node: onnx.NodeProto) -> Shape:
        """The shape of a tensor that `node` reads or writes.

        Raises:
            CompressionError: it could not be inferred.
        """
        if name not in self.shapes:
            label = node.name or node.output[0]
            raise CompressionError(
                f"the shapes in this model cannot be inferred at {node.op_type} {label!r}",
                found=f"no shape for {name!r}",
                expected="sizes that follow from the inputs' shapes",
                fix="simplify the model, or export it with fixed axes",
            )
        return self.shapes[name]


def load_for_shapes(path: Path) -> onnx.ModelProto:
    """A model without its large weights, whatever its size; small constants are read."""
    model = onnx_model.load_model(path, with_weights=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= SMALL_ELEMENTS:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.absolute().parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def infer_shapes(
    model: onnx.ModelProto,
    *,
    lengths: Mapping[str, int] | None = None,
    default_length: int = DEFAULT_LENGTH,
) -> Shapes:
    """Shapes for one sample: a free first axes are 1, others what `lengths` says, else the default.

    Nothing is computed but what shapes depend on, so weights need not be there. `model` stays as it is.

    Raises:
        CompressionError: ONNX's shape inference refuses the model.
    """
    skeleton = _skeleton(model)
    _fix_inputs(skeleton.graph, lengths or {}, default_length)
    values = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in skeleton.graph.initializer
        if _has_data(tensor)
    }
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for _ in range(ROUNDS):
        shapes |= _inferred(skeleton)
        if not _fold(skeleton, shapes, values):
            break
    return Shapes(shapes=shapes, values=values)


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without large weights, with standard operators in place of Microsoft's."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    copy.graph.name = model.graph.name
    copy.graph.input.extend(model.graph.input)
    for value in model.graph.output:
        copy.graph.output.append(onnx.ValueInfoProto(name=value.name))
    for tensor in model.graph.initializer:
        small = math.prod(tensor.dims) <= SMALL_ELEMENTS and tensor.data_location != onnx.TensorProto.EXTERNAL
        light = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        copy.graph.initializer.append(tensor if small else light)
    for node in model.graph.node:
        constant = _constant_of(node)
        if constant is not None:
            copy.graph.initializer.append(constant)
        else:
            copy.graph.node.append(_stand_in(node, copy.graph))
    return copy


def _constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant":
        return None
    (array,) = _run(node, {}, [])
    return onnx.numpy_helper.from_array(array, node.output[0])


def _stand_in(node: onnx.NodeProto, graph: onnx.GraphProto) -> onnx.NodeProto:
    if node.domain != "com.microsoft" or node.op_type not in STAND_INS:
        return node
    kind = STAND_INS[node.op_type]
    inputs = list(node.input)
    if node.op_type == "MatMulNBits":
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        inputs[1] = f"{node.output[0]}.weight"
        weight = onnx.TensorProto(
            name=inputs[1], dims=(sizes["K"], sizes["N"]), data_type=onnx.TensorProto.FLOAT
        )
        graph.initializer.append(weight)
    if node.op_type in QLINEAR_BINARY or node.op_type == "QGemm":
        inputs = [inputs[0], inputs[3]]
    count = {"Identity": 1, "Conv": 3, "Gemm": 3}.get(kind, 2)
    made = onnx.helper.make_node(kind, inputs[:count], list(node.output[:1]), name=node.name)
    known = set(onnx.defs.get_schema(kind).attributes)
    made.attribute.extend(attribute for attribute in node.attribute if attribute.name in known)
    return made


def _fix_inputs(graph: onnx.GraphProto, lengths: Mapping[str, int], default_length: int) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in weights or not value.type.HasField("tensor_type"):
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                continue
            one = axis == 0 or dim.dim_param == BATCH_AXIS
            dim.dim_value = lengths.get(dim.dim_param, 1 if one else default_length)


def _inferred(skeleton: onnx.ModelProto) -> dict[str, Shape]:
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise CompressionError("the shapes in this model cannot be inferred", found=error) from error
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            continue
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(int(dim.dim_value) for dim in tensor.shape.dim)
    return shapes


def _fold(skeleton: onnx.ModelProto, shapes: dict[str, Shape], values: dict[str, NDArray[Any]]) -> bool:
    """Turn nodes whose results are known into constants; whether there were any."""
    left, changed = [], False
    for node in skeleton.graph.node:
        results = _results(node, shapes, values, skeleton)
        if results is None:
            left.append(node)
            continue
        changed = True
        for name, array in zip(node.output, results, strict=False):
            values[name] = array
            shapes[name] = array.shape
            skeleton.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if changed:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in left]
        del skeleton.graph.node[:]
        skeleton.graph.node.extend(kept)
    return changed


def _results(
    node: onnx.NodeProto,
    shapes: Mapping[str, Shape],
    values: Mapping[str, NDArray[Any]],
    skeleton: onnx.ModelProto,
) -> list[NDArray[Any]] | None:
    if node.op_type in ("Shape", "Size") and node.input[0] in shapes:
        shape = np.array(shapes[node.input[0]], dtype=np.int64)
        if node.op_type == "Size":
            return [np.asarray(shape.prod(), dtype=np.int64)]
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        return [shape[ends.get("start", 0) : ends.get("end", len(shape))]]
    inputs = [name for name in node.input if name]
    if node.domain or node.op_type not in SHAPE_OPS or any(name not in values for name in inputs):
        return None
    unknown = SMALL_ELEMENTS + 1 if node.op_type in GROWING_OPS else 1
    if any(math.prod(shapes.get(name, (unknown,))) > SMALL_ELEMENTS for name in node.output):
        return None
    try:
        return _run(node, {name: values[name] for name in inputs}, skeleton.opset_import)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # what it gives stays unknown; whoever needs its shape says so


def _run(
    node: onnx.NodeProto, inputs: Mapping[str, NDArray[Any]], opsets: Iterable[onnx.OperatorSetIdProto]
) -> list[NDArray[Any]]:
    """What one standard operator gives, by ONNX's reference implementation."""
    typed = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in inputs.items()
    ]
    given = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = onnx.helper.make_graph([node], "one", typed, given)
    model = onnx.helper.make_model(graph, opset_imports=list(opsets) or None)
    return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, dict(inputs))]


def _has_data(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type == onnx.TensorProto.STRING or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    size = math.prod(tensor.dims)
    filled = bool(tensor.raw_data) or any(
        len(field) for field in (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
    )
    return size <= SMALL_ELEMENTS and (filled or size == 0)
