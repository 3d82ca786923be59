"""Nodes in an order that ONNX's own checker accepts."""

from __future__ import annotations

import random

import onnx
import pytest

from onnx_models import branching_model, model_from_text
from tritonsmith.compress.order import sort_nodes


def diamond() -> onnx.ModelProto:
    return model_from_text(
        "diamond (float[N, 4] x) => (float[N, 4] y) "
        "{ a = Relu(x)  b = Neg(a)  c = Abs(a)  d = Add(b, c)  e = Exp(d)  y = Add(e, a) }"
    )


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_nodes_come_back_in_an_order_that_the_checker_accepts(seed: int) -> None:
    model = diamond()
    nodes = list(model.graph.node)
    random.Random(seed).shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    sort_nodes(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert sorted(node.op_type for node in model.graph.node) == sorted(node.op_type for node in nodes)


def test_nodes_in_order_stay_where_they_are() -> None:
    model = diamond()
    before = model.SerializeToString()
    sort_nodes(model.graph)
    assert model.SerializeToString() == before


def test_what_a_branch_reads_from_around_it_comes_before_it() -> None:
    model = branching_model()
    model.graph.input[1].name = "given"
    model.graph.node.append(onnx.helper.make_node("Neg", ["given"], ["x"]))  # only the branches read x
    sort_nodes(model.graph)
    assert [node.op_type for node in model.graph.node][-1] == "If"
    onnx.checker.check_model(model, full_check=True)
