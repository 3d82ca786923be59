"""Small graphs with what quantization must tell apart: attention, residuals, outliers, tied weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tritonsmith.artifact import TensorSpec
from tritonsmith.samples import Samples, load_samples

Array = NDArray[Any]


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    integers: bool = False,
    opset: int = 17,
) -> onnx.ModelProto:
    kind = TensorProto.INT64 if integers else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def samples_of(path: Path, specs: tuple[TensorSpec, ...], array: Array) -> Samples:
    """An .npz with one array for the only input."""
    arrays: dict[str, Any] = {specs[0].name: array}
    np.savez(path, **arrays)
    return load_samples(path, specs)


def cosine(ours: Array, theirs: Array) -> float:
    return float((ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs))


def attention_model(*, width: int = 32) -> onnx.ModelProto:
    """tokens [batch, sequence] -> Gather, an attention head, LayerNormalization -> hidden."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.3, (width, width)) for name in ("wq", "wk", "wv")}
    weights |= {"table": rng.normal(size=(100, width)), "scale": np.ones(width), "bias": np.zeros(width)}
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"], name="embed"),
        *(
            helper.make_node("MatMul", ["x", f"w{part}"], [part], name=f"project_{part}")
            for part in ("q", "k", "v")
        ),
        helper.make_node("Transpose", ["k"], ["kt"], name="transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"], name="mix"),
        helper.make_node("Add", ["x", "mixed"], ["sum"], name="add"),
        helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["hidden"], name="norm"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", width])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def residual_model() -> onnx.ModelProto:
    """image [batch, 3, 8, 8] -> Conv, Relu, two Conv beside a shortcut, Add, Relu, pool, up, two products.

    `up` is a ConvTranspose, `narrow` a product of 16 x 4: a side below 16.
    """
    rng = np.random.default_rng(3)
    weights = {
        "k0": rng.normal(0, 0.4, (16, 3, 3, 3)),
        "k1": rng.normal(0, 0.1, (16, 16, 3, 3)),
        "k2": rng.normal(0, 0.1, (16, 16, 3, 3)),
        "b2": rng.normal(0, 0.1, 16),
        "ku": rng.normal(0, 0.1, (16, 8, 2, 2)),
        "wide_w": rng.normal(0, 0.1, (512, 16)),
        "narrow_w": rng.normal(0, 0.3, (16, 4)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "k0"], ["c0"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "stem_relu"),
        helper.make_node("Conv", ["r0", "k1"], ["c1"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "first_relu"),
        helper.make_node("Conv", ["r1", "k2", "b2"], ["c2"], "second", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r0"], ["sum"], "shortcut"),
        helper.make_node("Relu", ["sum"], ["r2"], "sum_relu"),
        helper.make_node("MaxPool", ["r2"], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ConvTranspose", ["pooled", "ku"], ["up"], "up", strides=[2, 2]),
        helper.make_node("Flatten", ["up"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "wide_w"], ["wide_y"], "wide"),
        helper.make_node("Relu", ["wide_y"], ["wide_r"], "wide_relu"),
        helper.make_node("MatMul", ["wide_r", "narrow_w"], ["narrow_y"], "narrow"),
        helper.make_node("Softmax", ["narrow_y"], ["probabilities"], "softmax"),
    ]
    shapes: dict[str, list[int | str]] = {"image": ["batch", 3, 8, 8]}
    return build(nodes, weights, inputs=shapes, outputs={"probabilities": ["batch", 4]})


def outlier_model(*, normalised: bool) -> onnx.ModelProto:
    """x [batch, 32] -> LayerNormalization with two loud channels -> product; the residual is kept or not."""
    rng = np.random.default_rng(5)
    gamma = np.ones(32)
    gamma[[3, 17]] = 60.0
    weights = {"gamma": gamma, "beta": rng.normal(0, 0.1, 32), "w": rng.normal(0, 0.2, (32, 32))}
    weights["w"][[3, 17]] *= 0.02
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normal"], "norm"),
        helper.make_node("MatMul", ["normal", "w"], ["product"], "product"),
        helper.make_node("Add", ["product", "x" if normalised else "normal"], ["y"], "add"),
    ]
    shapes: dict[str, list[int | str]] = {"x": ["batch", 32]}
    return build(nodes, weights, inputs=shapes, outputs={"y": ["batch", 32]})


def tied_model(rows: int = 600, width: int = 32) -> onnx.ModelProto:
    """tokens [batch, sequence] -> embed -> product with the same table, transposed -> scores."""
    rng = np.random.default_rng(7)
    weights = {"table": rng.normal(size=(rows, width)) * rng.uniform(0.1, 4, (rows, 1))}
    weights["mix"] = rng.normal(0, 0.3, (width, width))
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "mix"], ["mixed"], "mixer"),
        helper.make_node("Softmax", ["mixed"], ["weights"], "softmax"),
        helper.make_node("Transpose", ["table"], ["columns"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["weights", "columns"], ["scores"], "head"),
    ]
    shapes: dict[str, list[int | str]] = {"tokens": ["batch", "sequence"]}
    outputs: dict[str, list[int | str]] = {"scores": ["batch", "sequence", rows]}
    return build(nodes, weights, inputs=shapes, outputs=outputs, integers=True)
