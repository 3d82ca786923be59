"""Bringing a model below the opset of operators that onnx's converter cannot take there."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tritonsmith.ingest.clean import fit_opset
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.onnx_model import opset_of

X = np.linspace(-6, 6, 24, dtype=np.float32).reshape(4, 6)


def model_of(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def answer(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_expanded(approximate: str) -> None:
    model = model_of([helper.make_node("Gelu", ["x"], ["y"], "gelu", approximate=approximate)], [])
    expected = answer(model)
    lowered = fit_opset(model, ConvertOptions(opset=17))
    onnx.checker.check_model(lowered)
    assert opset_of(lowered) == 17
    assert "Gelu" not in {node.op_type for node in lowered.graph.node}
    np.testing.assert_allclose(answer(lowered), expected, atol=1e-6)


def test_gelu_stays_where_the_opset_has_it() -> None:
    model = model_of([helper.make_node("Gelu", ["x"], ["y"], "gelu")], [])
    assert [node.op_type for node in fit_opset(model, ConvertOptions()).graph.node] == ["Gelu"]


def test_a_reduction_loses_the_attribute_that_older_opsets_lack() -> None:
    axes = numpy_helper.from_array(np.array([1]), "axes")
    node = helper.make_node("ReduceL2", ["x", "axes"], ["y"], "norm", noop_with_empty_axes=0, keepdims=1)
    model = model_of([node], [axes])
    lowered = fit_opset(model, ConvertOptions(opset=17))
    onnx.checker.check_model(lowered)
    np.testing.assert_allclose(answer(lowered), np.linalg.norm(X, axis=1, keepdims=True), rtol=1e-6)
