"""Which weights of a graph can be stored in blocks: those of matrix products, and embedding tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tritonsmith.compress.graph import nodes_of

FEWEST_ELEMENTS = 1024  # scales and nodes of anything smaller would weigh as much
WEIGHT_OPS = frozenset({"Conv", "ConvTranspose", "GRU", "Gather", "Gemm", "LSTM", "MatMul", "RNN"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A float32 weight and the nodes that read it: `[K, N]` of products, or a table `[rows, width]`."""

    weight: str
    is_table: bool
    nodes: tuple[str, ...]  # their names


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A weight that stays as it is, and why."""

    weight: str
    reason: str

    def __str__(self) -> str:
        return f"{self.weight}: {self.reason}"


def products_from_gemms(graph: onnx.GraphProto) -> None:
    """Write every plain Gemm with a constant weight as MatMul and Add; a transposed weight is turned.

    Engines fuse a DequantizeLinear with MatMul, and not with Gemm.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    turned: dict[str, str] = {}
    for node in graph.node:
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        name = node.input[1]
        if options.get("transB", 0):
            if name not in turned:
                turned[name] = f"{name}_transposed"
                array = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
                graph.initializer.append(numpy_helper.from_array(array, turned[name]))
            name = turned[name]
        bias = len(node.input) > 2 and node.input[2] != ""
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], name=node.name))
        if bias:
            adds = [product, node.input[2]]
            nodes.append(helper.make_node("Add", adds, [node.output[0]], name=f"{node.name}_bias"))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def find_targets(
    graph: onnx.GraphProto, *, keep: Collection[str], embeddings: bool
) -> tuple[tuple[Target, ...], tuple[Left, ...]]:
    """The weights that can be stored in blocks, and those of some size that cannot, in the graph's order.

    Nodes have names of their own. A weight is taken only where every node that reads it can be rewritten:
    else it would lie in the file twice.
    """
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in nodes_of(graph):
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
    top = {id(node) for node in graph.node}
    outputs = {value.name for value in graph.output}
    targets, left = [], []
    for tensor in graph.initializer:
        found = readers.get(tensor.name, [])
        if len(tensor.dims) < 2 or not any(node.op_type in WEIGHT_OPS for node, _ in found):
            continue
        reason = _reason_against(tensor, found, keep, embeddings)
        if tensor.name in outputs or any(id(node) not in top for node, _ in found):
            reason = "it is read inside a branch or loop, or is an output"
        if reason is not None:
            left.append(Left(weight=tensor.name, reason=reason))
            continue
        nodes = tuple(node.name for node, _ in found)
        is_table = found[0][0].op_type == "Gather"
        targets.append(Target(weight=tensor.name, is_table=is_table, nodes=nodes))
    return tuple(targets), tuple(left)


def _reason_against(
    tensor: onnx.TensorProto,
    readers: Sequence[tuple[onnx.NodeProto, int]],
    keep: Collection[str],
    embeddings: bool,
) -> str | None:
    kinds = {(node.op_type, index) for node, index in readers}
    if tensor.data_type != TensorProto.FLOAT:
        return "it is not float32"
    if len(tensor.dims) != 2:
        return f"it has {len(tensor.dims)} axes"
    if int(np.prod(tensor.dims)) < FEWEST_ELEMENTS:
        return "it is too small to gain from it"
    if any(node.name in keep for node, _ in readers):
        return "kept as asked"
    if kinds == {("MatMul", 1)}:
        return None
    if kinds == {("Gather", 0)}:
        if any(attribute.i != 0 for node, _ in readers for attribute in node.attribute):
            return "it is looked up along another axis"
        return None if embeddings else "embeddings are left out"
    names = ", ".join(sorted({node.op_type for node, _ in readers}))
    return f"it is read by {names} in a way that has no blocked form"
