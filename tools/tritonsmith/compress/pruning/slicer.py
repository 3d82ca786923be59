"""Removing chosen channels from an ONNX graph: every weight, constant and attribute that knows of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith.compress.cost import parameters_of
from tritonsmith.compress.graph import drop_unused
from tritonsmith.compress.pruning.axes import Rewrite, node_name
from tritonsmith.compress.pruning.groups import Channels, Plan, plan_groups
from tritonsmith.compress.shapes import Shape, infer_shapes
from tritonsmith.errors import CompressionError

TRIES = 20
FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
)
CONSTANT_TYPES: Mapping[str, type[np.generic]] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def plan_pruning(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Plan]:
    """The model with its Constant nodes as initializers, and what can be removed from it.

    The plan is tried: one channel of each group is removed, and a node whose shape then is not what its
    channels say is left alone from then on, with what it reads.

    Raises:
        CompressionError: the shapes cannot be inferred.
    """
    model = with_initializers(model)
    shapes = infer_shapes(model)
    parameters = parameters_of(model, shapes)
    spared: dict[str, str] = {}
    for _ in range(TRIES):
        plan = plan_groups(model, parameters, spared)
        trial = {group.name: np.arange(1, group.size) for group in plan.prunable if group.size > 1}
        wrong = _mismatch(slice_graph(model, plan, trial), plan, plan.kept_ids(trial))
        if wrong is None:
            return model, plan
        spared[node_name(wrong)] = (
            f"{wrong.op_type} {node_name(wrong)!r} has a shape that cannot be rewritten"
        )
    raise CompressionError(
        "what can be pruned from this model cannot be told",
        found=f"{TRIES} nodes whose shapes cannot be rewritten, such as {', '.join(list(spared)[:3])}",
        fix="simplify the model first",
    )


def with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which constants are initializers, so that there is one kind of weight."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = [node for node in copy.graph.node if node.op_type == "Constant"]
    for node in constants:
        copy.graph.initializer.append(onnx.numpy_helper.from_array(_constant(node), node.output[0]))
    left = [node for node in model.graph.node if node.op_type != "Constant"]
    del copy.graph.node[:]
    copy.graph.node.extend(left)
    _separate_vectors(copy.graph)
    return copy


def _separate_vectors(graph: onnx.GraphProto) -> None:
    """Give each node a bias or scale of its own: equal ones, shared to save bytes, would tie their layers."""
    vectors = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type in FLOATS and max(tensor.dims, default=1) == math.prod(tensor.dims) > 1
    }
    seen: set[str] = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in seen and name in vectors:
                twin = graph.initializer.add()
                twin.CopyFrom(vectors[name])
                twin.name = node.input[place] = _free_name(graph, f"{name}_{node.output[0]}")
            seen.add(name)


def _constant(node: onnx.NodeProto) -> NDArray[Any]:
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return onnx.numpy_helper.to_array(value)
    return np.array(value, dtype=CONSTANT_TYPES.get(attribute.name))


def prune_channels(model: onnx.ModelProto, plan: Plan, kept: Mapping[str, Channels]) -> onnx.ModelProto:
    """A smaller copy of a model from `plan_pruning`, with only these channels left of the groups named.

    Raises:
        CompressionError: the smaller graph has other shapes than its channels say.
    """
    sliced = slice_graph(model, plan, kept)
    wrong = _mismatch(sliced, plan, plan.kept_ids(kept))
    if wrong is not None:
        raise CompressionError(
            f"the pruned graph does not fit together at {wrong.op_type} {node_name(wrong)!r}",
            fix="add the node to keep",
        )
    return sliced


def slice_graph(model: onnx.ModelProto, plan: Plan, kept: Mapping[str, Channels]) -> onnx.ModelProto:
    """The same, unchecked."""
    stays = plan.kept_ids(kept)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        axes = [axis for axis in range(len(tensor.dims)) if (tensor.name, axis) in plan.axes]
        masks = {axis: stays[plan.axes[tensor.name, axis]] for axis in axes}
        if all(mask.all() for mask in masks.values()):
            continue
        array = onnx.numpy_helper.to_array(tensor)
        for axis, mask in masks.items():
            array = np.compress(mask, array, axis=axis)
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    _rewrite(copy.graph, plan, stays)
    del copy.graph.value_info[:]
    drop_unused(copy.graph)
    return copy


def _rewrite(graph: onnx.GraphProto, plan: Plan, stays: NDArray[np.bool_]) -> None:
    """Put the new sizes in place, each in a constant of its own."""
    inputs: dict[tuple[int, int], list[Rewrite]] = {}
    for rewrite in plan.rewrites:
        node = graph.node[rewrite.node]
        if isinstance(rewrite.target, int):
            inputs.setdefault((rewrite.node, rewrite.target), []).append(rewrite)
        else:
            value = rewrite.value(lambda ids: stays[ids])
            _set_attribute(node, rewrite.target, value)
    made: dict[int, list[onnx.NodeProto]] = {}
    for (index, place), rewrites in inputs.items():
        values = [(item.element, item.value(lambda ids: stays[ids])) for item in rewrites]
        joined = _rewrite_input(graph, graph.node[index], place, values, plan.shapes)
        if joined is not None:
            made.setdefault(index, []).append(joined)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    for index, node in enumerate(nodes):
        graph.node.extend((*made.get(index, ()), node))


def _set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    for attribute in [item for item in node.attribute if item.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, value if isinstance(value, int) else list(value)))


def _rewrite_input(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    place: int,
    values: list[tuple[int | None, Any]],
    shapes: Mapping[str, Shape],
) -> onnx.NodeProto | None:
    """Give a node a constant of its own; where it is made by a Concat, that Concat's twin comes back."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    while len(node.input) <= place:
        node.input.append("")
    name = node.input[place]
    whole = next((value for element, value in values if element is None), None)
    if whole is not None:
        if node.op_type == "Split":  # sizes take the place of a number of equal parts
            for attribute in [item for item in node.attribute if item.name == "num_outputs"]:
                node.attribute.remove(attribute)
        node.input[place] = _add_constant(graph, node, place, np.asarray(whole))
        return None
    if name in tensors:
        array = onnx.numpy_helper.to_array(tensors[name]).copy()
        for element, value in values:
            array[element] = value
        node.input[place] = _add_constant(graph, node, place, array)
        return None
    maker = next((other for other in graph.node if name in other.output), None)
    if maker is None or maker.op_type != "Concat":
        return None  # sizes that are computed from others follow them
    return _rewrite_concat(graph, node, place, maker, values, shapes)


def _rewrite_concat(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    place: int,
    maker: onnx.NodeProto,
    values: list[tuple[int | None, Any]],
    shapes: Mapping[str, Shape],
) -> onnx.NodeProto | None:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    twin = onnx.NodeProto()
    twin.CopyFrom(maker)
    changed, start = False, 0
    for piece, name in enumerate(maker.input):
        length = math.prod(shapes[name])
        inside = [(element - start, value) for element, value in values if element is not None]
        inside = [(element, value) for element, value in inside if 0 <= element < length]
        if name in tensors and inside:
            array = onnx.numpy_helper.to_array(tensors[name]).copy()
            for element, value in inside:
                array[element] = value if array[element] > 0 else array[element]
            twin.input[piece] = _add_constant(graph, node, place, array)
            changed = True
        start += length
    if not changed:
        return None
    twin.output[0] = _free_name(graph, f"{node.output[0]}_sizes")
    twin.name = twin.output[0]
    node.input[place] = twin.output[0]
    return twin


def _add_constant(graph: onnx.GraphProto, node: onnx.NodeProto, place: int, array: NDArray[Any]) -> str:
    name = _free_name(graph, f"{node.output[0]}_pruned_{place}")
    graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return name


def _free_name(graph: onnx.GraphProto, name: str) -> str:
    taken = {tensor.name for tensor in graph.initializer}
    taken |= {output for node in graph.node for output in node.output}
    while name in taken:
        name += "_"
    return name


def _mismatch(sliced: onnx.ModelProto, plan: Plan, stays: NDArray[np.bool_]) -> onnx.NodeProto | None:
    """The first node that gives another shape than the channels that are left say, if any."""
    try:
        after = infer_shapes(sliced).shapes
    except CompressionError:
        after = {}
    nodes: list[onnx.NodeProto] = list(sliced.graph.node)
    for node in nodes:
        for name in node.output:
            if name not in plan.shapes:
                continue
            expected = list(plan.shapes[name])
            for axis, ids in plan.flow.get(name, ()):
                expected[axis] = int(stays[ids].sum())
            if after.get(name) != tuple(expected):
                return node
    return None
