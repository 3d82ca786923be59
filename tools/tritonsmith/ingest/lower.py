"""What onnx's own converter cannot bring to an older opset: Gelu below 20, Reduce below 18."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tritonsmith import dtypes

GELU_OPSET = 20  # the first with a Gelu operator
AXES_OPSET = 18  # the first where reductions take their axes as an input


def help_converter(model: onnx.ModelProto, found: int, wanted: int) -> None:
    """Change, in place, what would keep `version_converter` from going down from `found` to `wanted`."""
    if wanted < GELU_OPSET <= found:
        expand_gelu(model)
    if wanted < AXES_OPSET <= found:
        drop_noop_axes(model)


def drop_noop_axes(model: onnx.ModelProto) -> None:
    """Drop `noop_with_empty_axes`, which the converter would leave behind, where axes are given."""
    for node in model.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) == 2 and node.input[1]:
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)


def expand_gelu(model: onnx.ModelProto) -> None:
    """Write each Gelu of the main graph as ONNX defines it: x/2 (1 + erf(x/sqrt 2)), or with tanh.

    Source: onnx/docs/Operators.md, Gelu. The constants have the type that the graph says for the input;
    where it says none, that of FP32.
    """
    graph = model.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "Gelu" or node.domain not in ("", "ai.onnx"):
            graph.node.append(node)
            continue
        element = types.get(node.input[0], onnx.TensorProto.FLOAT)
        tanh = any(attribute.s == b"tanh" for attribute in node.attribute if attribute.name == "approximate")
        parts = _tanh_nodes(node) if tanh else _erf_nodes(node)
        graph.node.extend(parts)
        base = node.output[0]
        for name, value in (_TANH_CONSTANTS if tanh else _ERF_CONSTANTS).items():
            array = np.asarray(value, dtypes.BY_ONNX[element].numpy)
            graph.initializer.append(numpy_helper.from_array(array, f"{base}_{name}"))


_ERF_CONSTANTS = {"half": 0.5, "one": 1.0, "root": math.sqrt(2.0)}
_TANH_CONSTANTS = {"half": 0.5, "one": 1.0, "three": 3.0, "cubic": 0.044715, "scale": math.sqrt(2 / math.pi)}


def _erf_nodes(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, out = node.input[0], node.output[0]
    return [
        helper.make_node("Div", [x, f"{out}_root"], [f"{out}_scaled"], f"{node.name}_scale"),
        helper.make_node("Erf", [f"{out}_scaled"], [f"{out}_erf"], f"{node.name}_erf"),
        helper.make_node("Add", [f"{out}_erf", f"{out}_one"], [f"{out}_gate"], f"{node.name}_gate"),
        helper.make_node("Mul", [x, f"{out}_gate"], [f"{out}_gated"], f"{node.name}_gated"),
        helper.make_node("Mul", [f"{out}_gated", f"{out}_half"], [out], f"{node.name}_half"),
    ]


def _tanh_nodes(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, out = node.input[0], node.output[0]
    return [
        helper.make_node("Pow", [x, f"{out}_three"], [f"{out}_cube"], f"{node.name}_cube"),
        helper.make_node("Mul", [f"{out}_cube", f"{out}_cubic"], [f"{out}_small"], f"{node.name}_small"),
        helper.make_node("Add", [x, f"{out}_small"], [f"{out}_sum"], f"{node.name}_sum"),
        helper.make_node("Mul", [f"{out}_sum", f"{out}_scale"], [f"{out}_scaled"], f"{node.name}_scale"),
        helper.make_node("Tanh", [f"{out}_scaled"], [f"{out}_tanh"], f"{node.name}_tanh"),
        helper.make_node("Add", [f"{out}_tanh", f"{out}_one"], [f"{out}_gate"], f"{node.name}_gate"),
        helper.make_node("Mul", [x, f"{out}_gate"], [f"{out}_gated"], f"{node.name}_gated"),
        helper.make_node("Mul", [f"{out}_gated", f"{out}_half"], [out], f"{node.name}_half"),
    ]
