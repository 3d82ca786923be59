"""Repeated blocks: found in residual nets and transformers, and dropped without breaking the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from onnx_models import linear_model, model_from_text
from tritonsmith.compress.distillation.depth import Run, drop_blocks, find_runs, find_states, spread
from tritonsmith.errors import CompressionError

WIDTH = 4


def residual_model(blocks: int = 4, *, tap: bool = False) -> onnx.ModelProto:
    """y = x @ first, then per block y = relu(y + y @ w_i @ v_i), then y @ last; `tap` also gives block 1."""
    random = np.random.default_rng(3)
    names = ["first", "last", *(f"{kind}{i}" for i in range(blocks) for kind in "wv")]
    weights = {name: random.normal(0, 0.5, (WIDTH, WIDTH)).astype(np.float32) for name in names}
    nodes = ["s0 = MatMul(x, first)"]
    for i in range(blocks):
        nodes += [f"a{i} = MatMul(s{i}, w{i})", f"b{i} = MatMul(a{i}, v{i})"]
        nodes += [f"c{i} = Add(s{i}, b{i})", f"s{i + 1} = Relu(c{i})"]
    nodes += [f"y = MatMul(s{blocks}, last)"]
    extra = f", float[N, {WIDTH}] s1" if tap else ""
    return model_from_text(
        f"net (float[N, {WIDTH}] x) => (float[N, {WIDTH}] y{extra}) {{ {'  '.join(nodes)} }}", weights
    )


def expected(model: onnx.ModelProto, x: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    y = x @ weights["first"]
    for i in kept:
        y = np.maximum(0, y + y @ weights[f"w{i}"] @ weights[f"v{i}"])
    return np.asarray(y @ weights["last"])


def masked_model() -> onnx.ModelProto:
    """Three layers that look up a table and each read a mask and a shape, in the manner of a transformer."""
    random = np.random.default_rng(4)
    weights: dict[str, np.ndarray] = {
        f"{kind}{i}": random.normal(0, 0.3, (6, 6)).astype(np.float32) for i in range(3) for kind in "qkv"
    }
    weights |= {"table": random.normal(size=(11, 6)).astype(np.float32)}
    weights |= {f"g{i}": np.ones(6, np.float32) for i in range(3)}
    nodes = ["h0 = Gather(table, ids)", "shape = Shape(h0)", "m = Cast<to: int = 1>(mask)"]
    nodes += ["axis = Constant<value_ints = [1]>()", "bias = Unsqueeze(m, axis)"]
    for i in range(3):
        nodes += [f"q{i}_ = MatMul(h{i}, q{i})", f"k{i}_ = MatMul(h{i}, k{i})", f"v{i}_ = MatMul(h{i}, v{i})"]
        nodes += [f"kt{i} = Transpose<perm: ints = [0, 2, 1]>(k{i}_)"]
        nodes += [f"p{i} = MatMul(q{i}_, kt{i})", f"pm{i} = Add(p{i}, bias)", f"a{i} = Softmax(pm{i})"]
        nodes += [f"o{i} = MatMul(a{i}, v{i}_)", f"r{i} = Reshape(o{i}, shape)", f"s{i} = Add(h{i}, r{i})"]
        nodes += [f"h{i + 1} = LayerNormalization(s{i}, g{i})"]
    nodes += ["y = Identity(h3)"]
    return model_from_text(
        f"bert (int64[N, L] ids, int64[N, L] mask) => (float[N, L, 6] y) {{ {'  '.join(nodes)} }}", weights
    )


def test_blocks_of_a_residual_net_are_found() -> None:
    assert find_runs(residual_model().graph) == (Run(borders=("s0", "s1", "s2", "s3", "s4")),)


def test_layers_that_share_a_mask_are_found() -> None:
    assert find_runs(masked_model().graph) == (Run(borders=("h0", "h1", "h2", "h3")),)
    assert find_states(masked_model().graph) == ("h1", "h2", "h3")


@pytest.mark.parametrize(("share", "kept"), [(0.5, (0, 3)), (0.75, (0, 2, 3)), (0.25, (3,)), (0.01, (3,))])
def test_what_is_left_computes_the_kept_blocks(share: float, kept: tuple[int, ...]) -> None:
    whole, model = residual_model(), residual_model()
    x = np.random.default_rng(5).normal(size=(3, WIDTH)).astype(np.float32)

    counts = drop_blocks(model.graph, share)

    onnx.checker.check_model(model, full_check=True)
    found = InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected(whole, x, kept), rtol=1e-4, atol=1e-5)
    assert counts == {"s0": (4, len(kept))}
    assert len(model.graph.initializer) == 2 + 2 * len(kept)


def test_dropped_layers_of_a_transformer_leave_a_model_that_runs() -> None:
    model = masked_model()
    drop_blocks(model.graph, 0.6)

    session = InferenceSession(model.SerializeToString())
    ids = np.ones((2, 5), np.int64)
    assert session.run(None, {"ids": ids, "mask": ids})[0].shape == (2, 5, 6)
    assert [node.op_type for node in model.graph.node].count("Softmax") == 2


def test_a_graph_without_repetition_has_no_depth_to_take() -> None:
    with pytest.raises(CompressionError, match="repeats no block"):
        drop_blocks(linear_model().graph, 0.5)


def test_a_share_that_leaves_every_block_is_refused() -> None:
    with pytest.raises(CompressionError, match="leaves every block"):
        drop_blocks(residual_model().graph, 0.9)


def test_blocks_past_an_early_output_are_not_taken() -> None:
    """What leaves after the first block has not gone through the others."""
    assert find_runs(residual_model(tap=True).graph) == ()


def test_a_branch_past_a_split_is_no_block() -> None:
    """Half of what is split skips the product, so nothing in between is a cut point."""
    model = model_from_text(
        "net (float[N, 4] x) => (float[N, 2] y) {"
        " a, b = Split<axis = 1, num_outputs = 2>(x)"
        " p = MatMul(a, w)  r = Relu(p)  q = MatMul(r, w)  y = Add(q, b) }",
        {"w": np.eye(2, dtype=np.float32)},
    )

    assert find_runs(model.graph) == ()
    assert find_states(model.graph) == ()


def test_places_are_spread_evenly() -> None:
    assert spread(6, 3) == (0, 2, 5)
    assert spread(12, 6) == (0, 2, 4, 7, 9, 11)  # the layers that DistilBERT took
    assert spread(4, 1) == (3,)
    assert spread(0, 0) == ()
