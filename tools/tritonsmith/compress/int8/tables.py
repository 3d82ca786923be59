"""Embedding tables in INT8, one scale a row, and weights that a file need not hold twice."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tritonsmith.compress.graph import drop_unused, readers_of
from tritonsmith.compress.int8.qdq_tensorrt import quantize_weight

FEWEST_VALUES = 1024  # of a table: the nodes around a smaller one take more than it saves


def quantize_tables(graph: onnx.GraphProto, *, spared: frozenset[str]) -> int:
    """Store the table of each Gather in INT8, symmetric, a scale a row; return how many there were.

    What is gathered is widened afterwards, so that no run touches the rest of the table.
    """
    readers = readers_of(graph)
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
        if np.prod(tensor.dims) >= FEWEST_VALUES
    }
    found: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        lookup = node.op_type == "Gather" and node.input[0] in tables and not _axis(node)
        if not lookup or any(reader.name in spared for reader in readers[node.input[0]]):
            nodes.append(node)
            continue
        table = node.input[0]
        if table not in found:
            _store(graph, tables[table])
            found.add(table)
        nodes.extend(_lookup(node, table))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    drop_unused(graph)
    return len(found)


def share_weights(graph: onnx.GraphProto) -> int:
    """Keep one of equal initializers, and read an INT8 one that is another transposed through a Transpose.

    ONNX Runtime folds that Transpose away when it loads the model. Returns the bytes saved.
    """
    kept: dict[bytes, onnx.TensorProto] = {}
    renamed: dict[str, str] = {}
    flipped: dict[str, str] = {}
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) >= FEWEST_VALUES]
    saved = 0
    for tensor in sorted(large, key=lambda tensor: tensor.name):
        array = numpy_helper.to_array(tensor)
        same = kept.setdefault(_key(array), tensor)
        if same is not tensor:
            renamed[tensor.name] = same.name
        elif array.dtype == np.int8 and array.ndim == 2:
            twin = kept.get(_key(np.ascontiguousarray(array.T)))
            if twin is None or twin is tensor:
                continue
            flipped[tensor.name] = twin.name
        else:
            continue
        saved += array.nbytes
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for name, other in flipped.items():
        graph.node.insert(0, helper.make_node("Transpose", [other], [name], f"{name}_Transpose", perm=[1, 0]))
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == name))
    drop_unused(graph)
    return saved


def _axis(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def _store(graph: onnx.GraphProto, table: onnx.TensorProto) -> None:
    values, scales = quantize_weight(numpy_helper.to_array(table), 0)
    graph.initializer.append(numpy_helper.from_array(values, f"{table.name}_rows_quantized"))
    graph.initializer.append(numpy_helper.from_array(scales[:, None], f"{table.name}_row_scales"))


def _lookup(node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
    out = node.output[0]
    rows, wide, scales = f"{out}_rows", f"{out}_wide", f"{out}_scales"
    return [
        helper.make_node("Gather", [f"{table}_rows_quantized", node.input[1]], [rows], node.name),
        helper.make_node("Cast", [rows], [wide], f"{node.name}_cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_row_scales", node.input[1]], [scales], f"{node.name}_scales"),
        helper.make_node("Mul", [wide, scales], [out], f"{node.name}_scale"),
    ]


def _key(array: NDArray[np.generic]) -> bytes:
    digest = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=16)
    digest.update(array.tobytes())
    return digest.digest()
