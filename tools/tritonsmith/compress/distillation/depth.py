"""The blocks that a graph repeats, such as layers of a transformer: found by structure, and dropped.

A cut point is a tensor that everything on the way from an input to the outputs goes through. Between two
of them lies a segment; segments of the same structure (operators, attributes, shapes of weights) that
follow each other are repetitions, and each of them takes and gives a tensor of the same shape. So one
can be left out by reading what it takes for what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from tritonsmith.compress.graph import drop_unused, nodes_of
from tritonsmith.errors import CompressionError

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
# What comes out of these is a shape, a decision or an index: no state flows through them.
ASIDE = frozenset(
    {"ArgMax", "ArgMin", "And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less"}
    | {"LessOrEqual", "NonZero", "Not", "Or", "Shape", "Size", "Xor"}
)
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
MOST_STATES = 8  # of a graph without repetitions


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Repetitions of one block; block i takes `borders[i]` and gives `borders[i + 1]`."""

    borders: tuple[str, ...]

    @property
    def blocks(self) -> int:
        return len(self.borders) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flow:
    """What of a graph a state flows through."""

    makers: dict[str, onnx.NodeProto]
    readers: dict[str, list[onnx.NodeProto]]
    weights: dict[str, tuple[int, ...]]
    flowing: frozenset[str]  # tensors
    cuts: tuple[str, ...]  # in order


def find_runs(graph: onnx.GraphProto) -> tuple[Run, ...]:
    """Every repetition of a block with weights in it, in the order of the graph."""
    flow = _find_flow(graph)
    segments = tuple(
        _describe(flow, before, after) for before, after in zip(flow.cuts, flow.cuts[1:], strict=False)
    )
    runs, start = [], 0
    while start < len(segments):
        period, count, first = _best_repetition(flow, segments, start)
        if count < 2:
            start += 1
            continue
        runs.append(Run(borders=tuple(flow.cuts[first + period * k] for k in range(count + 1))))
        start = first + period * count
    return tuple(runs)


def find_states(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Hidden states worth comparing: what repeated blocks give, else some of the cut points."""
    if runs := find_runs(graph):
        return tuple(border for run in runs for border in run.borders[1:])
    flow = _find_flow(graph)
    outputs = {value.name for value in graph.output}
    between = [name for name in flow.cuts[1:] if name not in outputs and len(flow.readers[name]) > 0]
    activated = [name for name in between if flow.makers[name].op_type not in ("Reshape", "Transpose")]
    places = spread(len(activated), min(MOST_STATES, len(activated)))
    return tuple(activated[place] for place in places)


def drop_blocks(graph: onnx.GraphProto, share: float) -> dict[str, tuple[int, int]]:
    """Keep this share of each run's blocks, evenly spaced, and remove the others from `graph`.

    Returns how many there were and are, by the name of each run's first border.

    Raises:
        CompressionError: nothing is repeated between outputs, or nothing would go.
    """
    runs = find_runs(graph)
    if not runs:
        raise CompressionError(
            "no depth can be taken: the graph repeats no block",
            expected="blocks of the same structure behind each other, such as layers of a transformer",
            fix="give a student, or shrink its width",
        )
    gone: dict[str, str] = {}
    counts = {}
    for run in runs:
        kept = spread(run.blocks, max(1, round(run.blocks * share)))
        counts[run.borders[0]] = (run.blocks, len(kept))
        for index in sorted(set(range(run.blocks)) - set(kept)):
            before, after = run.borders[index : index + 2]
            gone[after] = gone.get(before, before)
    if not gone:
        raise CompressionError(
            f"depth = {share:g} leaves every block",
            found=", ".join(f"{blocks} blocks" for blocks, _ in counts.values()),
            fix="a smaller share",
        )
    for node in nodes_of(graph):
        for index, name in enumerate(node.input):
            node.input[index] = gone.get(name, name)
    drop_dead_nodes(graph)
    return counts


def spread(count: int, kept: int) -> tuple[int, ...]:
    """`kept` of `count` places, evenly spaced; the last is always among them, the first where two are."""
    if kept <= 1:
        return (count - 1,) * kept
    return tuple(round(index * (count - 1) / (kept - 1)) for index in range(kept))


def drop_dead_nodes(graph: onnx.GraphProto) -> None:
    """Remove nodes that no output depends on, their weights, and what is noted of their tensors."""
    needed = {value.name for value in graph.output}
    alive = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        alive.append(node)
        inner = [n for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in nodes_of(a.g)]
        needed |= {name for each in (node, *inner) for name in each.input}
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(alive)]
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)
    made = {name for node in kept for name in node.output}
    for value in [value for value in graph.value_info if value.name not in made]:
        graph.value_info.remove(value)


def _find_flow(graph: onnx.GraphProto) -> _Flow:
    """The state that has the most cut points; a mask that every layer reads is another one."""
    makers = {name: node for node in graph.node for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = {name: [] for name in makers}
    for node in graph.node:
        for name in dict.fromkeys(filter(None, node.input)):
            readers.setdefault(name, []).append(node)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sources = [
        value.name
        for value in graph.input
        if value.name not in weights and value.type.tensor_type.elem_type in FLOATS
    ]
    sources += [node.output[0] for node in graph.node if _is_lookup(node, weights)]
    flows = [_trace(graph, makers, readers, weights, source) for source in sources]
    nothing = _Flow(makers=makers, readers=readers, weights=weights, flowing=frozenset(), cuts=())
    return max(flows, key=lambda flow: len(flow.cuts), default=nothing)


def _is_lookup(node: onnx.NodeProto, weights: dict[str, tuple[int, ...]]) -> bool:
    return node.op_type == "Gather" and len(weights.get(node.input[0], ())) == 2


def _trace(
    graph: onnx.GraphProto,
    makers: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
    weights: dict[str, tuple[int, ...]],
    source: str,
) -> _Flow:
    """Follow the state from `source`; a tensor is a cut point when every path to an output is through it."""
    paths = {source: 1}
    order = [source]
    for node in graph.node:
        count = sum(paths.get(name, 0) for name in node.input)
        if not count or node.op_type in ASIDE:
            continue
        for name in filter(None, node.output):
            paths.setdefault(name, count)
            order.append(name)
    outputs = {value.name for value in graph.output}
    onward: dict[str, int] = {}
    for name in reversed(order):
        ahead = [
            list(node.input).count(name) * onward.get(output, 0)
            for node in readers.get(name, ())
            for output in node.output
            if output in paths
        ]
        onward[name] = int(name in outputs) + sum(ahead)
    total = onward[source]
    cuts = tuple(name for name in order if total and paths[name] * onward[name] == total)
    return _Flow(makers=makers, readers=readers, weights=weights, flowing=frozenset(paths), cuts=cuts)


def _describe(flow: _Flow, before: str, after: str) -> str:
    """The structure of what lies between two cut points; equal texts mean equal structure.

    Inputs are followed in order. What is seen again is named by its number, weights by their shape, and
    what no state of `before` flows into (a mask, a position, a shape) is all the same.
    """
    inside = _inside(flow, before, after)
    numbers: dict[str, int] = {before: 0}
    words: list[str] = []
    stack: list[str] = [after]
    while stack:
        name = stack.pop()
        if name in numbers:
            words.append(f"@{numbers[name]}")
        elif name in flow.weights:
            words.append(f"w{flow.weights[name]}")
        elif name not in inside:
            words.append("side" if name else "none")
        else:
            numbers[name] = len(numbers)
            node = flow.makers[name]
            options = sorted(attribute.SerializeToString().hex() for attribute in node.attribute)
            words.append(f"{node.domain}{node.op_type}({','.join(options)})/{len(node.input)}")
            stack.extend(reversed(node.input))
    return " ".join(words)


def _inside(flow: _Flow, before: str, after: str) -> frozenset[str]:
    """Tensors between two cut points: those that depend on `before`, on the way back from `after`."""
    depends: dict[str, bool] = {before: True}
    stack = [after]
    while stack:
        name = stack[-1]
        node = flow.makers.get(name)
        if name in depends or node is None or node.op_type in ASIDE:
            depends.setdefault(name, False)
            stack.pop()
            continue
        waiting = [part for part in node.input if part and part not in depends]
        if waiting:
            stack.extend(waiting)
        else:
            depends[name] = any(depends[part] for part in node.input if part)
            stack.pop()
    return frozenset(name for name, does in depends.items() if does and name != before)


def _best_repetition(flow: _Flow, segments: Sequence[str], start: int) -> tuple[int, int, int]:
    """The repetition of a block with weights that covers most from `start` on: (period, count, first).

    Of the turns of one block, that whose borders have the most readers: a residual is read twice.
    """
    best = (1, 1, start)
    for period in range(1, (len(segments) - start) // 2 + 1):
        count = _repeats(segments, start, period)
        if count < 2 or not _has_weights(segments[start : start + period]):
            continue
        if count * period > best[0] * best[1] or best[1] < 2:
            best = (period, count, start)
    period, count, _ = best
    if count < 2:
        return best
    turns = [turn for turn in range(start, start + period) if _repeats(segments, turn, period) >= count]
    first = max(turns, key=lambda turn: (_read(flow, flow.cuts[turn]), -turn))
    return period, _repeats(segments, first, period), first


def _repeats(segments: Sequence[str], start: int, period: int) -> int:
    block, count = list(segments[start : start + period]), 1
    while list(segments[start + count * period : start + (count + 1) * period]) == block:
        count += 1
    return count


def _has_weights(segments: Sequence[str]) -> bool:
    words = {word.split("(")[0] for segment in segments for word in segment.split()}
    return bool(words & WEIGHTED)


def _read(flow: _Flow, name: str) -> int:
    return sum(not flow.flowing.isdisjoint(node.output) for node in flow.readers.get(name, ()))
