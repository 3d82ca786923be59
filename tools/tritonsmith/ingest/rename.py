"""Giving a graph's inputs and outputs the names that the source uses, whatever lies inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from tritonsmith.errors import SourceError


def set_names(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Rename the graph's inputs and outputs, in their order, in place.

    An inner tensor that already has one of the names gets another. An output that is itself an input
    or a weight, and the second of two outputs that are one tensor, are led through an Identity.
    Inputs that an initializer feeds are no inputs any more.

    Raises:
        SourceError: the graph has another number of inputs or outputs, or two names are equal.
    """
    graph = model.graph
    _drop_fed_inputs(graph)
    for what, values, names in (("inputs", graph.input, inputs), ("outputs", graph.output, outputs)):
        if len(values) != len(names):
            raise SourceError(
                f"the exported graph has {len(values)} {what}, the source has {len(names)}",
                found=[value.name for value in values],
                expected=list(names),
            )
    wanted = [*inputs, *outputs]
    if repeated := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise SourceError(f"two tensors of the signature share a name: {', '.join(repeated)}", found=wanted)
    taken = set(_all_names(graph)) | set(wanted)
    _detach_outputs(graph, taken)
    current = [value.name for value in (*graph.input, *graph.output)]
    mapping = dict(zip(current, wanted, strict=True))
    inner = sorted((_defined_names(graph) & set(wanted)) - set(current))
    mapping.update((name, _fresh(name, taken)) for name in inner)
    _rename(graph, mapping, frozenset(wanted), taken)


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graphs that the nodes of `graph` hold (If, Loop, Scan), one level down."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


def _drop_fed_inputs(graph: onnx.GraphProto) -> None:
    weights = _weight_names(graph)
    kept = [value for value in graph.input if value.name not in weights]
    if len(kept) < len(graph.input):
        del graph.input[:]
        graph.input.extend(kept)


def _detach_outputs(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Make every output the result of a node, and of one that no other output shares."""
    bound = {value.name for value in graph.input} | _weight_names(graph)
    for output in graph.output:
        if output.name in bound:
            fresh = _fresh(output.name, taken)
            graph.node.append(onnx.helper.make_node("Identity", [output.name], [fresh], name=fresh))
            output.name = fresh
        bound.add(output.name)


def _rename(
    graph: onnx.GraphProto, names: Mapping[str, str], wanted: frozenset[str], taken: set[str]
) -> None:
    """Apply `names` to this scope and below; a name that an inner scope defines again is its own."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = names.get(entry.value, entry.value)
    for inner in subgraphs(graph):
        defined = _defined_names(inner)
        outer = {old: new for old, new in names.items() if old not in defined}
        aside = {name: _fresh(name, taken) for name in sorted(defined & wanted)}
        _rename(inner, {**outer, **aside}, wanted, taken)


def _weight_names(graph: onnx.GraphProto) -> set[str]:
    sparse = {tensor.values.name for tensor in graph.sparse_initializer}
    return {tensor.name for tensor in graph.initializer} | sparse


def _defined_names(graph: onnx.GraphProto) -> set[str]:
    results = {name for node in graph.node for name in node.output if name}
    return results | {value.name for value in graph.input} | _weight_names(graph)


def _all_names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from _defined_names(graph)
    yield from (name for node in graph.node for name in node.input)
    for inner in subgraphs(graph):
        yield from _all_names(inner)


def _fresh(name: str, taken: set[str]) -> str:
    count = 1
    while (candidate := f"{name}_inner_{count}") in taken:
        count += 1
    taken.add(candidate)
    return candidate
