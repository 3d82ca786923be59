"""SmoothQuant (Xiao et al., arXiv 2211.10438): outliers of activations moved into the weights that read them.

Each input channel j of a matrix product is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), and row j
of the weights multiplied by it; the product is the same, and its input is easier to put into 256 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tritonsmith import onnx_model
from tritonsmith.compress.graph import drop_unused, readers_of
from tritonsmith.compress.int8.taps import run_tapped
from tritonsmith.errors import UsageError
from tritonsmith.samples import Samples

Vector = NDArray[np.float32]
Groups = Mapping[str, list[onnx.NodeProto]]


def smooth_model(
    prepared: Path, alpha: float, samples: Samples, *, batched: bool, spared: frozenset[str]
) -> tuple[Path, int]:
    """Write the smoothed model beside `prepared`; return it and how many tensors were smoothed.

    The division goes into the LayerNormalization or the constant factor that makes the tensor where nothing
    else reads it, else into a Mul of its own.

    Raises:
        CompressionError: the graph cannot be run.
        UsageError: alpha is not between 0 and 1.
    """
    if not 0.0 < alpha < 1.0:
        raise UsageError(
            f"smooth = {alpha:g} is no alpha of SmoothQuant", expected="between 0 and 1, 0.5 is usual"
        )
    model = onnx_model.load_model(prepared)
    groups = _groups(model.graph, spared)
    largest = _largest(prepared, groups, samples, batched=batched)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, nodes in groups.items():
        factors = _factors(largest[name], nodes, weights, alpha)
        for weight in {node.input[1]: node for node in nodes}.values():
            _multiply(weights[weight.input[1]], factors, axis=_input_axis(weight))
        if not _fold(model.graph, name, nodes, factors, weights):
            _insert(model.graph, name, nodes, factors)
    drop_unused(model.graph)
    out = prepared.with_name("smoothed.onnx")
    onnx_model.save_model(model, out)
    return out, len(groups)


def _groups(graph: onnx.GraphProto, spared: frozenset[str]) -> dict[str, list[onnx.NodeProto]]:
    """By tensor, the matrix products with weights that read it; weights that others read too are left out."""
    weights = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    }
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        product = node.op_type in ("Gemm", "MatMul") and node.input[1] in weights
        flipped = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        if product and not flipped and node.name not in spared:
            groups.setdefault(node.input[0], []).append(node)
    readers = readers_of(graph)
    return {
        name: nodes
        for name, nodes in groups.items()
        if name not in weights and all(reader in nodes for node in nodes for reader in readers[node.input[1]])
    }


def _largest(prepared: Path, groups: Groups, samples: Samples, *, batched: bool) -> dict[str, Vector]:
    """The largest magnitude of each channel, the last axis, of each tensor."""
    found: dict[str, Vector] = {}
    for _, tensors in run_tapped(prepared, list(groups), samples, batched=batched):
        for name, array in tensors.items():
            rows = np.abs(array.reshape(-1, array.shape[-1])).max(axis=0)
            found[name] = np.maximum(found[name], rows) if name in found else rows
    return found


def _factors(
    activations: Vector, nodes: list[onnx.NodeProto], weights: Mapping[str, onnx.TensorProto], alpha: float
) -> Vector:
    rows = [
        np.abs(numpy_helper.to_array(weights[node.input[1]])).max(axis=1 - _input_axis(node))
        for node in nodes
    ]
    largest = np.max(rows, axis=0)
    used = (activations > 0) & (largest > 0)
    factors = np.ones_like(activations)
    factors[used] = activations[used] ** alpha / largest[used] ** (1 - alpha)
    return factors.astype(np.float32)


def _input_axis(node: onnx.NodeProto) -> int:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if transposed else 0


def _multiply(weight: onnx.TensorProto, factors: Vector, *, axis: int) -> None:
    array = numpy_helper.to_array(weight)
    scaled = array * (factors[:, None] if axis == 0 else factors)
    weight.CopyFrom(numpy_helper.from_array(scaled.astype(np.float32), weight.name))


def _fold(
    graph: onnx.GraphProto,
    name: str,
    nodes: list[onnx.NodeProto],
    factors: Vector,
    weights: Mapping[str, onnx.TensorProto],
) -> bool:
    """Divide what makes the tensor, where these products are all that read it."""
    readers = readers_of(graph)
    maker = next((node for node in graph.node if name in node.output), None)
    if maker is None or name in {value.name for value in graph.output}:
        return False
    if any(reader not in nodes or name in reader.input[1:] for reader in readers[name]):
        return False
    if maker.op_type == "LayerNormalization":
        parts = [part for part in maker.input[1:] if part]
    elif maker.op_type == "Mul":
        parts = [part for part in maker.input if part in weights][:1]
    else:
        return False
    own = [part in weights and len(readers[part]) == 1 for part in parts]
    if not parts or not all(own) or any(list(weights[part].dims) != [len(factors)] for part in parts):
        return False
    for part in parts:
        divided = numpy_helper.to_array(weights[part]) / factors
        weights[part].CopyFrom(numpy_helper.from_array(divided, part))
    return True


def _insert(graph: onnx.GraphProto, name: str, nodes: list[onnx.NodeProto], factors: Vector) -> None:
    divided, inverse = f"{name}_smoothed", f"{name}_smooth_factors"
    graph.initializer.append(numpy_helper.from_array((1 / factors).astype(np.float32), inverse))
    for value in [*graph.value_info, *graph.input]:
        if value.name == name:
            kind = onnx.ValueInfoProto()
            kind.CopyFrom(value)
            kind.name = divided
            graph.value_info.append(kind)
            break
    first = min(index for index, node in enumerate(graph.node) if node in nodes)
    for node in nodes:
        node.input[0] = divided
    graph.node.insert(first, helper.make_node("Mul", [name, inverse], [divided], f"{name}_smooth"))
