"""Small classifiers of scikit-learn's scanned digits, with accuracies that are real, and their samples.

The dense layers are fitted by scikit-learn on two thirds of the digits; the rows are split by a seeded
permutation into training (also calibration) and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.neural_network import MLPClassifier

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images `[N, 8, 8]` in 0..1, labels `[N]`."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


@cache
def split_digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)[order]
    labels = labels.astype(np.int64)[order]
    return Digits(
        train_images=images[:1200],
        train_labels=labels[:1200],
        test_images=images[1200:],
        test_labels=labels[1200:],
    )


def mlp_model() -> onnx.ModelProto:
    """A copy of its own for each caller, who may change it."""
    model = onnx.ModelProto()
    model.CopyFrom(_fitted_mlp())
    return model


@cache
def _fitted_mlp() -> onnx.ModelProto:
    """image [batch, 64] -> Gemm, Relu, Gemm, Softmax -> probabilities [batch, 10]."""
    digits = split_digits()
    fitted = MLPClassifier((64,), max_iter=60, tol=0.0, n_iter_no_change=1000, random_state=0)
    images = digits.train_images.reshape(-1, 64)
    for _ in range(60):
        fitted.partial_fit(images, digits.train_labels, classes=np.arange(10))
    (w1, w2), (b1, b2) = fitted.coefs_, fitted.intercepts_
    nodes = [
        helper.make_node("Gemm", ["image", "w1", "b1"], ["hidden"], name="dense_1"),
        helper.make_node("Relu", ["hidden"], ["active"], name="relu_1"),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"], name="dense_2"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
    ]
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return make_model(nodes, weights, image_shape=["batch", 64])


def conv_model(*, opset: int = 17) -> onnx.ModelProto:
    """image [batch, 1, 8, 8] -> two Conv + BatchNormalization + Relu, MaxPool, Gemm, Softmax.

    The filters are random and fixed; a ridge regression is fitted on what they give.
    """
    nodes, weights = _conv_body()
    kernel, bias = _conv_head()
    nodes += [
        helper.make_node("Gemm", ["features", "w", "b"], ["logits"], name="dense"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
    ]
    weights |= {"w": kernel, "b": bias}
    return make_model(nodes, weights, image_shape=["batch", 1, 8, 8], opset=opset)


def _conv_body() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    rng = np.random.default_rng(1)
    weights = {
        "k1": rng.normal(0, 0.4, (16, 1, 3, 3)),
        "k2": rng.normal(0, 0.1, (32, 16, 3, 3)),
    }
    for index, channels in ((1, 16), (2, 32)):
        weights |= {
            f"scale{index}": rng.uniform(0.5, 1.5, channels),
            f"shift{index}": rng.normal(0, 0.1, channels),
            f"mean{index}": rng.normal(0, 0.1, channels),
            f"var{index}": rng.uniform(0.5, 1.5, channels),
        }
    nodes = []
    data = "image"
    for index in (1, 2):
        norm = [f"{part}{index}" for part in ("scale", "shift", "mean", "var")]
        nodes += [
            helper.make_node(
                "Conv", [data, f"k{index}"], [f"conv{index}"], name=f"conv_{index}", pads=[1] * 4
            ),
            helper.make_node(
                "BatchNormalization", [f"conv{index}", *norm], [f"norm{index}"], name=f"norm_{index}"
            ),
            helper.make_node("Relu", [f"norm{index}"], [f"relu{index}"], name=f"relu_{index}"),
        ]
        data = f"relu{index}"
    nodes += [
        helper.make_node("MaxPool", [data], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["features"], name="flatten"),
    ]
    return nodes, weights


@cache
def _conv_head() -> tuple[Array, Array]:
    """Weights [512, 10] and bias [10]; ridge scores lie in -1..1, so softmax needs them steeper."""
    nodes, weights = _conv_body()
    output: tuple[str, list[int | str]] = ("features", ["batch", 512])
    body = make_model(nodes, weights, image_shape=["batch", 1, 8, 8], output=output)
    digits = split_digits()
    features = run(body, digits.train_images[:, None])[0]
    head = RidgeClassifier(alpha=1.0).fit(features, digits.train_labels)
    return 6 * head.coef_.T, 6 * head.intercept_


def make_model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    image_shape: list[int | str],
    output: tuple[str, list[int | str]] = ("probabilities", ["batch", 10]),
    opset: int = 17,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image_shape)],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, images: Array) -> list[Array]:
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})


def write_artifact(model: onnx.ModelProto, path: Path) -> Artifact:
    onnx_model.save_model(model, path)
    inputs, outputs = onnx_model.signature_of(model)
    return Artifact(
        path=path,
        format="onnx",
        inputs=inputs,
        outputs=outputs,
        batched=onnx_model.is_batched(inputs, outputs),
        precision="fp32",
        steps=(),
    )


def write_samples(path: Path, images: Array, labels: Array | None = None) -> Path:
    arrays = {"image": images} if labels is None else {"image": images, "target": labels}
    np.savez(path, **arrays)
    return path
