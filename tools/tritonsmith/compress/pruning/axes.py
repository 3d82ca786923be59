"""Which channels of a graph live and die together, found by labels that flow through it.

Every axis of every tensor carries an integer array, one channel id for each position, or None where nothing
may go. An operator passes ids on, and joins those that must go together in a union-find: a sum joins
its operands, a product ties its contracted axis to the weights. What is not understood freezes ids, with the
reason. The idea is that of dependency graphs (DepGraph, Fang et al., arXiv 2301.12900), by channel.

`axis_rules.py` has the rule of each operator, `groups.py` makes groups of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith.compress.cost import flops_of
from tritonsmith.compress.shapes import Shape, Shapes

Ids: TypeAlias = NDArray[np.int64]  # [positions] of one axis
Labels: TypeAlias = "tuple[Ids | None, ...]"  # one entry for each axis of a tensor
Kept: TypeAlias = Callable[[Ids], NDArray[np.bool_]]  # which of these ids stay


class Unions:
    """Ids in sets that can be joined; the smallest id of a set stands for it."""

    def __init__(self) -> None:
        self._parents = np.empty(0, dtype=np.int64)

    @property
    def count(self) -> int:
        return len(self._parents)

    def make(self, count: int) -> Ids:
        start = len(self._parents)
        fresh = np.arange(start, start + count, dtype=np.int64)
        self._parents = np.concatenate((self._parents, fresh))
        return fresh

    def find(self, ids: Ids) -> Ids:
        """The id that stands for the set of each id, in the shape of `ids`."""
        roots = self._parents[ids]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[ids] = roots
        return roots

    def join(self, left: Ids, right: Ids) -> None:
        """Join position by position; the arrays broadcast."""
        pairs = np.stack(np.broadcast_arrays(self.find(left), self.find(right)), axis=-1).reshape(-1, 2)
        for one, other in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
            low, high = sorted((self._root(one), self._root(other)))
            self._parents[high] = low

    def _root(self, item: int) -> int:
        while (above := int(self._parents[item])) != item:
            item = above
        return item


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """A node that makes channels, and the ids of what it makes."""

    node: str
    kind: str  # "channels" of a convolution or "neurons" of a matrix
    ids: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """A number that a smaller graph needs to have changed.

    `target` is the place of a node's input, which is a constant, or the name of an attribute; `element` is
    the place inside of it, None for the whole.
    """

    node: int
    target: int | str
    element: int | None
    value: Callable[[Kept], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFlops:
    """The FLOPs of a node, which shrink in proportion to each of the axes in `ids`."""

    flops: int
    ids: tuple[Ids, ...]


@dataclass(slots=True, kw_only=True)
class Walk:
    """What is known while labels flow from node to node."""

    shapes: Shapes
    opset: int
    constants: set[str]  # names of initializers, and of what is made of them alone
    readers: Mapping[str, Sequence[onnx.NodeProto]]
    labels: dict[str, Labels] = field(default_factory=dict)
    unions: Unions = field(default_factory=Unions)
    producers: list[Producer] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    costs: list[NodeFlops] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    heads: list[Ids] = field(default_factory=list)
    reads: list[Ids] = field(default_factory=list)  # axes of weights that are summed over
    index: int = 0  # of the node that is looked at

    def shape(self, name: str, node: onnx.NodeProto) -> Shape:
        return self.shapes.of(name, node)

    def read(self, name: str, node: onnx.NodeProto) -> Labels:
        """The labels of a tensor; a weight gets fresh ones when it is first read."""
        if name not in self.labels:
            fresh = name in self.constants
            self.labels[name] = tuple(
                self.unions.make(size) if fresh and size > 1 else None for size in self.shape(name, node)
            )
        return self.labels[name]

    def write(self, name: str, labels: Sequence[Ids | None]) -> None:
        self.labels[name] = tuple(labels)

    def tie(self, left: Ids | None, right: Ids | None, node: onnx.NodeProto) -> Ids | None:
        """Join two axes of equal length; where one must stay, the other stays too."""
        if left is not None and right is not None:
            self.unions.join(left, right)
            return left
        for axis in (left, right):
            self.freeze(axis, f"meets an axis that must stay at {label_of(node)}")
        return None

    def contract(self, left: Ids | None, right: Ids | None, node: onnx.NodeProto) -> None:
        """Tie the axes of both operands that a product sums over."""
        self.tie(left, right, node)
        for ids, name in zip((left, right), node.input, strict=False):
            if ids is not None and self.is_constant(name):
                self.reads.append(ids)

    def freeze(self, ids: Ids | None, reason: str) -> None:
        if ids is not None:
            self.frozen.append((ids, reason))

    def freeze_all(self, node: onnx.NodeProto, reason: str) -> None:
        """Freeze whatever the node reads, and let nothing flow on."""
        for name in filter(None, node.input):
            if name in self.labels or name in self.constants:
                for axis in self.read(name, node):
                    self.freeze(axis, reason)
        for name in filter(None, node.output):
            self.write(name, [None] * len(self.shapes.shapes.get(name, ())))

    def produce(self, node: onnx.NodeProto, kind: str, ids: Ids | None) -> None:
        """Note that a node makes these channels."""
        if ids is not None:
            self.producers.append(Producer(node=node_name(node), kind=kind, ids=ids))

    def stay(self, count: int, reason: str) -> Ids:
        """Fresh ids that are frozen from the start."""
        ids = self.unions.make(count)
        self.freeze(ids, reason)
        return ids

    def is_constant(self, name: str) -> bool:
        return name in self.constants


def label_of(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node_name(node)!r}"


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or that of its first output where it has none."""
    return node.name or node.output[0]


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def listed(walk: Walk, node: onnx.NodeProto, place: int, name: str) -> list[int] | None:
    """Whole numbers that older opsets have in an attribute, newer ones in an input; None: not given."""
    if len(node.input) > place and node.input[place]:
        array = walk.shapes.values.get(node.input[place])
        return None if array is None else [int(item) for item in np.ravel(array)]
    found = attribute_of(node, name)
    return None if found is None else [int(item) for item in found]


def is_unread(node: onnx.NodeProto, place: int, walk: Walk) -> bool:
    """Whether an input is there whose value is not known."""
    return len(node.input) > place and bool(node.input[place]) and node.input[place] not in walk.shapes.values


def count_of(ids: Ids) -> Callable[[Kept], int]:
    return lambda kept: int(kept(ids).sum())


def label_axes(model: onnx.ModelProto, shapes: Shapes, spared: Mapping[str, str]) -> Walk:
    """Let labels flow through a graph without Constant nodes.

    `spared` has the names of nodes to take for unknown operators, with the reason for it.
    """
    from tritonsmith.compress.pruning.axis_rules import RULES

    graph = model.graph
    walk = Walk(
        shapes=shapes,
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1),
        constants={tensor.name for tensor in graph.initializer},
        readers=_readers(graph),
    )
    for value in graph.input:
        if value.name not in walk.constants:
            walk.write(value.name, [None] * len(value.type.tensor_type.shape.dim))
    for index, node in enumerate(graph.node):
        walk.index = index
        names = list(filter(None, node.input))
        if names and all(name in walk.constants for name in names) and not _has_graphs(node):
            walk.constants |= set(node.output)
        inner = [name for name in _outer_names(node) if name in walk.labels or name in walk.constants]
        for name in inner:
            for axis in walk.read(name, node):
                walk.freeze(axis, f"read inside of {label_of(node)}")
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if node_name(node) in spared:
            walk.freeze_all(node, spared[node_name(node)])
        elif rule is None or any(name not in shapes.shapes for name in (*names, *filter(None, node.output))):
            unknown = (
                "is no operator that channels are followed through" if rule is None else "has no known shape"
            )
            walk.freeze_all(node, f"{label_of(node)} {unknown}")
        else:
            rule(walk, node)
        _add_cost(walk, node)
    for value in graph.output:
        for axis in walk.labels.get(value.name, ()):
            walk.freeze(axis, f"output {value.name!r}")
    return walk


def _add_cost(walk: Walk, node: onnx.NodeProto) -> None:
    """FLOPs shrink with each labelled axis of the result, and with those that are summed over."""
    flops = flops_of(node, walk.shapes)
    if not flops:
        return
    axes = [axis for axis in walk.labels[node.output[0]] if axis is not None]
    if node.op_type == "Conv":
        axes += [axis for axis in walk.read(node.input[1], node)[1:2] if axis is not None]
    elif node.op_type == "ConvTranspose":
        axes += [axis for axis in walk.read(node.input[1], node)[:1] if axis is not None]
    elif node.op_type == "Gemm":
        place = 1 if any(item.name == "transB" and item.i for item in node.attribute) else 0
        axes += [axis for axis in walk.read(node.input[1], node)[place : place + 1] if axis is not None]
    elif node.op_type == "MatMul":
        axes += [axis for axis in walk.read(node.input[1], node)[-2:-1] if axis is not None]
    walk.costs.append(NodeFlops(flops=flops, ids=tuple(axes)))


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _has_graphs(node: onnx.NodeProto) -> bool:
    return any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)


def _outer_names(node: onnx.NodeProto) -> set[str]:
    """Every name that the graphs inside of a node read."""
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names |= {name for name in inner.input if name} | _outer_names(inner)
            names |= {value.name for value in attribute.g.output}
    return names
