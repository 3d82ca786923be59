"""Whole models in PyTorch against ONNX Runtime; weights, wraps and taps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from onnx_models import branching_model, linear_model, model_from_text
from tritonsmith import onnx_model
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError
from tritonsmith.ingest import convert
from tritonsmith.train.module import OnnxModule

Array = NDArray[Any]


def keras_source(folder: Path) -> str:
    """Depthwise, strided, normalised, with a residual: what Keras classifiers are made of."""
    import keras

    layers = keras.layers
    image = keras.Input((8, 8, 2), name="image")
    hidden = layers.Conv2D(4, 3, padding="same", strides=2, activation="relu")(image)
    shortcut = hidden
    hidden = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(hidden))
    hidden = layers.Add()([shortcut, hidden])
    hidden = layers.AveragePooling2D(3, strides=2, padding="same")(layers.ReLU(6.0)(hidden))
    hidden = layers.Dense(5, activation="gelu")(layers.Flatten()(layers.LayerNormalization()(hidden)))
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="label")(hidden))
    path = folder / "model.keras"
    model.save(path)
    return str(path)


def rows_for(path: Path) -> dict[str, Array]:
    random = np.random.default_rng(4)
    rows: dict[str, Array] = {}
    inputs, _ = onnx_model.signature_of(onnx_model.load_model(path))
    for spec in inputs:
        shape = [
            3 if index == 0 else 6 if isinstance(axis, str) else axis for index, axis in enumerate(spec.shape)
        ]
        if spec.dtype == "bool":
            rows[spec.name] = np.zeros(shape, bool)
        elif spec.dtype.startswith("int"):
            rows[spec.name] = random.integers(1, 10, shape).astype(spec.dtype)
        else:
            rows[spec.name] = random.normal(size=shape).astype(np.float32)
    return rows


@pytest.mark.parametrize("source", ["keras", "torch_models:attention"])
def test_converted_models_compute_the_same_and_learn(tmp_path: Path, source: str) -> None:
    artifact = convert(keras_source(tmp_path) if source == "keras" else source, tmp_path / "model.onnx")
    model = onnx_model.load_model(artifact.path)
    rows = rows_for(artifact.path)

    module = OnnxModule(model)
    outputs = module({name: torch.from_numpy(array) for name, array in rows.items()})

    expected = open_session(artifact.path).run(rows)
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name].detach().numpy(), array, rtol=1e-4, atol=1e-5)
    sum(value.square().sum() for value in outputs.values()).backward()
    silent = [name for name, weight in module.weights.items() if weight.requires_grad and weight.grad is None]
    assert not silent
    trained = sum(weight.numel() for weight in module.weights.values() if weight.requires_grad)
    assert trained > 0.9 * sum(weight.numel() for weight in module.weights.values())


def normed_model() -> onnx.ModelProto:
    """y = dense(batch norm(x)) + 1e-6, where the last number is an option of the graph, not a weight."""
    random = np.random.default_rng(5)
    names = {"scale": 4, "shift": 4, "mean": 4, "variance": 4, "bias": 1, "epsilon": 1}
    weights = {name: np.abs(random.normal(size=size)).astype(np.float32) for name, size in names.items()}
    weights["kernel"] = random.normal(size=(4, 1)).astype(np.float32)
    return model_from_text(
        "normed (float[N, 4] x) => (float[N, 1] y) {"
        " n = BatchNormalization(x, scale, shift, mean, variance)"
        " p = MatMul(n, kernel)  b = Add(p, bias)  r = Relu(b)  y = Add(r, epsilon) }",
        weights,
    )


def test_statistics_and_epsilons_are_not_trained() -> None:
    weights = OnnxModule(normed_model()).weights

    assert {name for name, weight in weights.items() if weight.requires_grad} == {
        *("scale", "shift", "kernel", "bias")
    }
    assert {name for name, weight in weights.items() if not weight.requires_grad} == {
        *("mean", "variance", "epsilon")
    }


def test_trained_weights_go_back_into_the_model(tmp_path: Path) -> None:
    model = linear_model()
    module = OnnxModule(model)
    with torch.no_grad():
        module.weights["weight"].mul_(2.0)
        module.weights["bias"].zero_()
    features = np.random.default_rng(6).normal(size=(5, 4)).astype(np.float32)
    before = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()

    module.write_weights(model)

    path = tmp_path / "model.onnx"
    onnx_model.save_model(model, path)
    scores = open_session(path).run({"features": features})["scores"]
    np.testing.assert_allclose(scores, features @ (2 * before), rtol=1e-5)


def test_weights_of_another_shape_are_not_written() -> None:
    module = OnnxModule(linear_model())
    other = model_from_text(
        "linear (float[N, 4] features) => (float[N, 2] scores) { scores = MatMul(features, weight) }",
        {"weight": np.ones((4, 2), np.float32)},
    )

    with pytest.raises(CompressionError, match="'weight' cannot be written back"):
        module.write_weights(other)


def test_wraps_change_weights_and_activations_and_taps_show_them() -> None:
    module = OnnxModule(linear_model(), wraps={"weight": lambda w: w * 0.0, "product": lambda p: p + 1.0})

    found = module({"features": torch.ones(2, 4)}, taps=("product",))

    assert torch.equal(found["product"], torch.ones(2, 3))
    assert torch.equal(found["scores"], 1.0 + module.weights["bias"].expand(2, 3))


def test_a_wrap_that_is_a_module_is_trained_with_the_rest() -> None:
    step = torch.nn.Linear(3, 3)
    module = OnnxModule(linear_model(), wraps={"product": step})

    assert set(step.parameters()) <= set(module.parameters())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(CompressionError, match="wrapped") as refusal:
        OnnxModule(linear_model(), wraps={"weigth": torch.relu})
    assert "weigth" in str(refusal.value)
    with pytest.raises(CompressionError, match="tapped"):
        OnnxModule(linear_model())({"features": torch.ones(1, 4)}, taps=("nothing",))


def test_branches_and_old_opsets_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"\(If\) cannot be trained"):
        OnnxModule(branching_model())
    with pytest.raises(CompressionError, match="opset too old"):
        OnnxModule(linear_model(opset=12))


def test_shape_arithmetic_on_constants_is_done_once() -> None:
    model = model_from_text(
        "flat (float[N, 2, 3] x) => (float[N, 6] y) {"
        " minus = Constant <value_ints = [-1]> ()  shape = Concat <axis = 0> (minus, six)"
        " y = Reshape(x, shape) }",
        {"six": np.array([6])},
    )

    module = OnnxModule(model)

    assert [call.kind for call in module._calls] == ["Reshape"]
    assert module({"x": torch.zeros(4, 2, 3)})["y"].shape == (4, 6)
