"""A traced TensorFlow function as an ONNX graph, by tf2onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tritonsmith.errors import SourceError
from tritonsmith.ingest.tensorflow_framework import first_line, import_framework, warnings_held

NEWEST_OPSET = 18  # that tf2onnx 1.17 writes


def onnx_from_concrete(source: Path, concrete: Any, opset: int) -> onnx.ModelProto:
    """The frozen function as ONNX.

    Not by tf2onnx's `from_function`, which takes constants that a function captured for inputs.
    """
    tf2onnx = import_framework("tf2onnx", source)
    model: onnx.ModelProto
    try:
        with warnings_held():
            frozen = _freeze(concrete)
            model, _ = tf2onnx.convert.from_graph_def(
                _without_xla(frozen.graph.as_graph_def(add_shapes=True)),
                input_names=[tensor.name for tensor in frozen.inputs],
                output_names=[tensor.name for tensor in frozen.outputs],
                opset=opset,
                custom_op_handlers={"Erfc": (_erfc, []), "Expm1": (_expm1, [])},
            )
    except Exception as error:
        raise SourceError(
            f"{source} cannot be converted to ONNX by tf2onnx", found=first_line(error)
        ) from error
    if unknown := sorted(_unknown_operators(model.graph, opset)):
        raise SourceError(
            f"{source} uses TensorFlow operations that tf2onnx cannot convert",
            found=", ".join(unknown),
            fix="move them out of the model, for example into a Python stage before or after it",
        )
    return model


def _freeze(concrete: Any) -> Any:
    """The function with its variables and captured tensors as constants, loops kept as they are."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(concrete, lower_control_flow=False, aggressive_inlining=True)


def _without_xla(graph: Any) -> Any:
    """The graph without the marks that keep a call whole; Keras 3 sets them around grouped convolutions."""
    for node in (*graph.node, *(node for function in graph.library.function for node in function.node_def)):
        node.attr.pop("_XlaMustCompile", None)
    for function in graph.library.function:
        for mark in ("_XlaMustCompile", "_noinline"):
            function.attr.pop(mark, None)
    return graph


def _erfc(context: Any, node: Any, name: str, arguments: Any) -> None:
    """erfc(x) is 1 - erf(x); exact GELU is made of it, and tf2onnx 1.17 does not know it."""
    del name, arguments
    (erfc,) = node.output
    data_type, shape = context.get_dtype(erfc), context.get_shape(erfc)
    context.remove_node(node.name)
    erf = context.make_node("Erf", node.input, dtypes=[data_type], shapes=[shape])
    one = _one(context, node.name, data_type)
    context.make_node("Sub", [one, erf.output[0]], outputs=[erfc], dtypes=[data_type], shapes=[shape])


def _expm1(context: Any, node: Any, name: str, arguments: Any) -> None:
    """expm1(x) is exp(x) - 1, a hair less exact near zero; CELU is made of it."""
    del name, arguments
    (expm1,) = node.output
    data_type, shape = context.get_dtype(expm1), context.get_shape(expm1)
    context.remove_node(node.name)
    exp = context.make_node("Exp", node.input, dtypes=[data_type], shapes=[shape])
    one = _one(context, node.name, data_type)
    context.make_node("Sub", [exp.output[0], one], outputs=[expm1], dtypes=[data_type], shapes=[shape])


def _one(context: Any, prefix: str, data_type: int) -> str:
    value = np.array(1, onnx.helper.tensor_dtype_to_np_dtype(data_type))
    return str(context.make_const(f"{prefix}_one", value).output[0])


def _unknown_operators(graph: onnx.GraphProto, opset: int) -> set[str]:
    unknown = set()
    for node in graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, opset):
            unknown.add(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                unknown |= _unknown_operators(attribute.g, opset)
    return unknown
