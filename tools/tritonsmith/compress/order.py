"""The order of a graph's nodes: ONNX wants each after what it reads; engines alone forgive another one."""

from __future__ import annotations

import onnx

from tritonsmith.compress.graph import nodes_of


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put makers before readers; nodes that are in order already keep their places.

    A node also reads what the graphs inside of it read. A loop of nodes is left as it is, for the checker.
    """
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needs = [
        sorted({makers[name] for name in _names_read(node) if name in makers} - {index})
        for index, node in enumerate(graph.node)
    ]
    order: list[int] = []
    placed, entered = set[int](), set[int]()
    for first in range(len(needs)):
        stack = [first]
        while stack:
            index = stack[-1]
            waiting = [need for need in needs[index] if need not in placed and need not in entered]
            entered.add(index)
            if waiting:
                stack.append(waiting[0])
                continue
            stack.pop()
            if index not in placed:
                placed.add(index)
                order.append(index)
    if order != sorted(order):
        nodes = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _names_read(node: onnx.NodeProto) -> list[str]:
    inner = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return [*node.input, *(name for graph in inner for inside in nodes_of(graph) for name in inside.input)]
