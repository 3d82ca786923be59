"""Which channels go together: groups worked out by hand, and the reasons why others stay."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_models import model_from_text
from prunable_models import MODELS
from tritonsmith.compress.pruning.axes import Unions
from tritonsmith.compress.pruning.groups import Plan
from tritonsmith.compress.pruning.slicer import plan_pruning

# (kind, channels, positions that one channel takes where it is made, number of nodes that make it)
EXPECTED = {
    "chain": [("neurons", 16, 1, 1), ("neurons", 24, 1, 1)],
    "dense_blocks": [("channels", 8, 1, 1), ("channels", 12, 1, 1), ("channels", 16, 1, 1)],
    # The excitation's last layer is coupled to what it scales, and that to the layer before.
    "depthwise": [("channels", 8, 1, 1), ("channels", 16, 1, 2), ("channels", 24, 1, 1)],
    "flat_nchw": [("channels", 8, 1, 1), ("neurons", 16, 1, 1)],
    "flat_nhwc": [("channels", 8, 1, 1), ("neurons", 16, 1, 1)],
    # Of the shuffled 32 channels, every second four meet the same place of a group of eight.
    "grouped": [("channels", 2, 16, 1), ("channels", 4, 4, 1), ("channels", 4, 4, 1)],
    # The left half of the first layer is coupled to the right branch by the shuffle.
    "halves": [("channels", 6, 2, 1), ("channels", 8, 1, 1), ("channels", 8, 1, 2)],
    "residual": [("channels", 8, 1, 1), ("channels", 16, 1, 2), ("channels", 24, 1, 2)],
    # The matrix that is read twice makes its own input; the bias that is read twice couples nothing.
    "shared": [("neurons", 16, 1, 3), ("neurons", 16, 1, 1)],
    "transformer": [("heads", 4, 8, 3), ("neurons", 64, 1, 1)],
}


def plan_of(name: str) -> Plan:
    return plan_pruning(MODELS[name]())[1]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_channels_that_go_together(name: str) -> None:
    groups = [(group.kind, group.size, group.width, len(group.nodes)) for group in plan_of(name).prunable]
    assert sorted(groups) == sorted(EXPECTED[name])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("chain", "output 'y'"),
        ("transformer", "LayerNormalization"),
        ("residual", "output 'y'"),
    ],
)
def test_what_stays_has_a_reason(name: str, part: str) -> None:
    assert any(part in str(group.frozen) for group in plan_of(name).frozen)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("s = Softmax <axis: int = -1> (h)", "Softmax"),
        ("s = CumSum (h, one)", "no operator that channels are followed through"),
        ("m = ReduceMax <keepdims: int = 1> (h, one)  s = Sub(h, m)", "computes over it"),
        ("t = Transpose(h)  u = Reshape(t, flat)  s = Reshape(u, back)", "merges two axes"),
    ],
)
def test_an_operator_that_mixes_channels_freezes_them(node: str, reason: str) -> None:
    random = np.random.default_rng(0)
    model = model_from_text(
        f"mixed (float[4, 6] x) => (float[4, 3] y) {{ h = MatMul(x, w1) {node} y = MatMul(s, w2) }}",
        {
            "w1": random.normal(size=(6, 8)).astype(np.float32),
            "w2": random.normal(size=(8, 3)).astype(np.float32),
            "one": np.array(1) if "CumSum" in node else np.array([1]),
            "flat": np.array([32]),
            "back": np.array([4, 8]),
        },
    )
    _, plan = plan_pruning(model)
    if "merges" in reason:
        assert [(group.size, group.frozen) for group in plan.prunable] == []
        return
    assert plan.prunable == ()
    assert any(reason in str(group.frozen) for group in plan.frozen)


def test_ids_that_are_joined_are_found_by_the_smallest() -> None:
    unions = Unions()
    left, right = unions.make(3), unions.make(3)
    unions.join(left, right[::-1].copy())
    unions.join(right[:1], right[1:2])
    np.testing.assert_array_equal(unions.find(right), [1, 1, 0])
    np.testing.assert_array_equal(unions.find(left), [0, 1, 1])
