"""Questions that several compression steps ask of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
RECURRENT_OPS = frozenset({"GRU", "LSTM", "RNN"})
PASSES_WEIGHTS_ON = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"})


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside its nodes (If, Loop, Scan)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def constants_of(graph: onnx.GraphProto) -> set[str]:
    """Names that hold weights, also behind a Constant, Transpose, Reshape or DequantizeLinear."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        passes = node.op_type in PASSES_WEIGHTS_ON and set(filter(None, node.input)) <= constants
        if node.op_type == "Constant" or passes:
            constants |= set(node.output)
    return constants


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove weights that nothing reads any more."""
    used = {name for node in nodes_of(graph) for name in node.input}
    used |= {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, those of inner graphs too."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes_of(graph):
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def is_transformer(graph: onnx.GraphProto) -> bool:
    """Whether a graph without convolutions is recurrent, normalises layers or multiplies activations."""
    kinds = {node.op_type for node in graph.node}
    if kinds & {"Conv", "ConvTranspose"}:
        return False
    constants = constants_of(graph)
    attention = any(
        node.op_type == "MatMul" and not constants & set(node.input) for node in graph.node
    ) or bool(kinds & {"Attention", "MultiHeadAttention"})
    normalised = "LayerNormalization" in kinds and "MatMul" in kinds
    return attention or normalised or bool(kinds & RECURRENT_OPS)
