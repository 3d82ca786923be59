"""A traced TensorFlow function as an ONNX graph, by tf2onnx."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tritonsmith.errors import SourceError
from tritonsmith.ingest.tensorflow_framework import first_line, import_framework, warnings_held

NEWEST_OPSET = 18  # that tf2onnx 1.17 writes
CATCH_ERRORS = "TF2ONNX_CATCH_ERRORS"


def onnx_from_concrete(source: Path, concrete: Any, opset: int) -> onnx.ModelProto:
    """The frozen function as ONNX.

    Raises:
        SourceError: tf2onnx fails, or leaves an operation as it is in TensorFlow.
    """
    tf2onnx = import_framework("tf2onnx", source)
    try:
        graph, *names = _freeze(concrete)
        try:
            model = _run_tf2onnx(tf2onnx, graph, names, opset, catch_errors=False)
        except Exception:  # noqa: BLE001 - tf2onnx can do without the optimisation that failed
            model = _run_tf2onnx(tf2onnx, graph, names, opset, catch_errors=True)
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


def _run_tf2onnx(
    tf2onnx: Any, graph: Any, names: list[list[str]], opset: int, *, catch_errors: bool
) -> onnx.ModelProto:
    """Convert a frozen GraphDef.

    Not by `from_function`, which takes constants that a function captured for inputs. To catch errors,
    tf2onnx copies the whole model before each of its many optimisations: 5 GB and 10 s for a ResNet-50.
    """
    before = os.environ.pop(CATCH_ERRORS, None)
    if not catch_errors:
        os.environ[CATCH_ERRORS] = "FALSE"  # in 1.17, any value stops it, TRUE too
    try:
        with warnings_held(), _weights_copied_once(tf2onnx):
            model: onnx.ModelProto
            model, _ = tf2onnx.convert.from_graph_def(
                graph,
                input_names=names[0],
                output_names=names[1],
                opset=opset,
                custom_op_handlers={name: (handler, []) for name, handler in HANDLERS.items()},
            )
            return model
    finally:
        os.environ.pop(CATCH_ERRORS, None)
        if before is not None:
            os.environ[CATCH_ERRORS] = before


@contextmanager
def _weights_copied_once(tf2onnx: Any) -> Iterator[None]:
    """Keep tf2onnx from writing every weight anew after each optimisation.

    Nothing reads those copies, and protobuf frees none before the end: 40 times the model's size.
    """
    node_class = tf2onnx.graph.Node
    update = node_class.update_proto

    def update_others(node: Any, external_tensor_storage: Any = None) -> None:
        if not node.is_const():
            update(node, external_tensor_storage)

    node_class.update_proto = update_others
    try:
        yield
    finally:
        node_class.update_proto = update


def _freeze(concrete: Any) -> tuple[Any, list[str], list[str]]:
    """The function as a GraphDef, with the names of its inputs and outputs.

    Variables and captured tensors become constants; loops stay as they are.
    """
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    frozen = convert_variables_to_constants_v2(concrete, lower_control_flow=False, aggressive_inlining=True)
    graph = _without_xla(frozen.graph.as_graph_def(add_shapes=True))
    return graph, [tensor.name for tensor in frozen.inputs], [tensor.name for tensor in frozen.outputs]


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


def _add(context: Any, node: Any, name: str, arguments: Any) -> None:
    """x + constant, where tf2onnx's transpose optimisation expects that no constant is a scalar."""
    del name, arguments
    node.type = "Add"
    for index, other in ((0, 1), (1, 0)):
        operand, shape = node.inputs[index], context.get_shape(node.input[other])
        if shape and operand.is_const() and operand.get_tensor_value(as_list=False).ndim == 0:
            value = operand.get_tensor_value(as_list=False).reshape(1)
            constant = context.make_const(f"{node.name}_operand_{index}", value)
            context.replace_input(node, node.input[index], constant.output[0], index)


def _one(context: Any, prefix: str, data_type: int) -> str:
    value = np.array(1, onnx.helper.tensor_dtype_to_np_dtype(data_type))
    return str(context.make_const(f"{prefix}_one", value).output[0])


HANDLERS = {"AddV2": _add, "Erfc": _erfc, "Expm1": _expm1}


def _unknown_operators(graph: onnx.GraphProto, opset: int) -> set[str]:
    unknown = set()
    for node in graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, opset):
            unknown.add(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                unknown |= _unknown_operators(attribute.g, opset)
    return unknown
