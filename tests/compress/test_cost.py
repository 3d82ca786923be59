"""Parameters and FLOPs against what PyTorch, Keras and arithmetic by hand say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from digits_models import write_artifact
from keras_models import randomised
from onnx_models import model_from_text, write_model
from prunable_models import MODELS
from tritonsmith.artifact import Artifact, TensorSpec
from tritonsmith.compress.cost import Cost, cost_of, costs_of, lengths_in
from tritonsmith.compress.int8.quantize import quantize_dynamic, quantize_static
from tritonsmith.errors import CompressionError
from tritonsmith.ingest import convert
from tritonsmith.samples import Samples, load_samples


def save(tmp_path: Path, model: onnx.ModelProto) -> Path:
    return write_model(tmp_path / "model.onnx", model)


def test_flops_are_those_of_pytorch(tmp_path: Path) -> None:
    import torch
    from torch.nn import functional
    from torch.utils.flop_counter import FlopCounterMode

    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 4, 3, 3), "w3": (8, 6, 2, 2), "w4": (6, 1, 3, 3), "w5": (6, 5)}
    weights = {name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()}
    model = model_from_text(
        "several (float[N, 3, 9, 7] x) => (float[N, 5] y) {"
        " a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1)  b = Conv <group: int = 2> (a, w2)"
        " c = ConvTranspose <strides = [2, 2]> (b, w3)  d = Conv <group: int = 6> (c, w4)"
        " e = GlobalAveragePool(d)  f = Flatten(e)  y = MatMul(f, w5) }",
        weights,
    )
    w1, w2, w3, w4, w5 = (torch.from_numpy(weights[name]) for name in sorted(weights))
    with FlopCounterMode(display=False) as counter:
        hidden = functional.conv2d(torch.ones(1, 3, 9, 7), w1, stride=2, padding=1)
        hidden = functional.conv_transpose2d(functional.conv2d(hidden, w2, groups=2), w3, stride=2)
        hidden = functional.conv2d(hidden, w4, groups=6).mean((2, 3))
        torch.mm(hidden, w5)

    cost = cost_of(save(tmp_path, model))
    assert cost.flops == counter.get_total_flops()
    assert cost.parameters == sum(np.prod(shape) for shape in shapes.values())


def test_attention_is_counted_at_the_given_length(tmp_path: Path) -> None:
    path = save(tmp_path, MODELS["transformer"]())

    def flops(length: int) -> int:
        projections = 4 * 32 * 32 + 2 * 32 * 64  # of each token
        return 2 * (length * projections + 2 * length * length * 32)

    assert cost_of(path).flops == flops(128)
    assert cost_of(path, default_length=10).flops == flops(10)
    assert cost_of(path, lengths={"length": 16}).flops == flops(16)
    assert cost_of(path).parameters == 20 * 32 + 6 * 32 + 4 * 32 * 32 + 3 * 32 + 2 * 32 * 64 + 64


def test_parameters_are_those_of_keras(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            layers.Conv2D(4, 1, use_bias=False),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    randomised(model).save(tmp_path / "model.keras")  # biases that are all zero are dropped by tf2onnx
    artifact = convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")
    by_hand = 10 * 10 * 8 * 27 + 8 * 8 * 16 * 9 + 8 * 8 * 4 * 16 + 256 * 10
    assert cost_of(artifact.path) == Cost(parameters=model.count_params(), flops=2 * by_hand)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_quantized_model_costs_what_it_was(tmp_path: Path, kind: str) -> None:
    if kind == "static":
        artifact = write_artifact(MODELS["flat_nchw"](), tmp_path / "model.onnx")
        images = np.random.default_rng(0).normal(size=(20, 2, 6, 6)).astype(np.float32)
        np.savez(tmp_path / "data.npz", x=images)
        calibration = load_samples(tmp_path / "data.npz", artifact.inputs)
        quantized = quantize_static(artifact, calibration, tmp_path / "int8.onnx")
    else:
        artifact = write_artifact(MODELS["transformer"](), tmp_path / "model.onnx")
        quantized = quantize_dynamic(artifact, tmp_path / "int8.onnx")
    assert cost_of(quantized.path) == cost_of(artifact.path)


def product(weight: TensorProto) -> onnx.ModelProto:
    model = model_from_text(
        "one (float[N, 64] x) => (float[N, 48] y) { y = MatMul(x, w) }", opset=21, ir_version=10
    )
    model.graph.initializer.append(weight)
    return model


def test_int4_weights_of_microsofts_operator_count_one_by_one(tmp_path: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    weight = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    model = product(onnx.numpy_helper.from_array(weight, "w"))
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    packed = quantizer.model.model
    assert [node.op_type for node in packed.graph.node] == ["MatMulNBits"]
    assert cost_of(save(tmp_path, packed)) == Cost(parameters=64 * 48, flops=2 * 64 * 48)


def test_int4_weights_of_onnx_count_one_by_one(tmp_path: Path) -> None:
    model = product(onnx.helper.make_tensor("q", TensorProto.INT4, (64, 48), np.ones(64 * 48, dtype=np.int8)))
    scales = np.ones((2, 48), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(scales, "s"))
    widen = onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=32)
    model.graph.node.insert(0, widen)
    assert cost_of(save(tmp_path, model)) == Cost(parameters=64 * 48, flops=2 * 64 * 48)


def test_weights_are_counted_once_and_not_read(tmp_path: Path) -> None:
    """4 GB of weights in a file that is not there, read by two nodes through Cast and Transpose."""
    model = model_from_text(
        "large (float16[N, 32768] x) => (float16[N, 32768] y)"
        " { w = Cast <to: int = 10> (big)  a = MatMul(x, w)  t = Transpose(w)  y = MatMul(a, t) }"
    )
    big = TensorProto(name="big", dims=(32768, 32768), data_type=TensorProto.FLOAT)
    big.data_location = TensorProto.EXTERNAL
    big.external_data.add(key="location", value="weights.bin")
    model.graph.initializer.append(big)
    assert cost_of(save(tmp_path, model)) == Cost(parameters=2**30, flops=2 * 2 * 2**30)


def test_each_node_has_its_own_line(tmp_path: Path) -> None:
    costs: dict[str, Any] = {cost.name: cost for cost in costs_of(save(tmp_path, MODELS["chain"]()))}
    assert (costs["a"].parameters, costs["a"].flops) == (6 * 16, 2 * 6 * 16)
    assert (costs["b"].parameters, costs["b"].flops) == (16, 0)
    assert (costs["d"].parameters, costs["d"].flops) == (24 * 16 + 24, 2 * 24 * 16)


def test_a_shape_that_cannot_be_told_is_named(tmp_path: Path) -> None:
    model = model_from_text(
        "odd (float[N, 4] x) => (float[N, 2] y) { h = far.Mystery(x)  y = MatMul(h, w) }",
        {"w": np.ones((4, 2), dtype=np.float32)},
        domains={"far": 1},
    )
    with pytest.raises(CompressionError, match="cannot be inferred at MatMul 'y'"):
        cost_of(save(tmp_path, model))


@pytest.mark.parametrize("batched", [True, False])
def test_free_axes_are_as_long_as_in_the_samples(batched: bool) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", "length", 4) if batched else ("length", 4))
    artifact = Artifact(
        path=Path("m.onnx"),
        format="onnx",
        inputs=(spec,),
        outputs=(),
        batched=batched,
        precision="fp32",
        steps=(),
    )
    samples = Samples(path=Path("x.npz"), sha256="", arrays={"x": np.zeros((3, 7, 4), "f4")}, target=None)
    assert lengths_in(samples, artifact) == {"length": 7}
    assert lengths_in(None, artifact) == {}
