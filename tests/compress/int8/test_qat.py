"""Quantization-aware fine-tuning: training sees what the file computes, and wins back what rounding lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from digits_models import conv_model, split_digits, write_artifact, write_samples
from fragile_models import FRAGILE, fragile_model, writer_of
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material, apply_step
from tritonsmith.compress.int8.qat import FakeQuantized, fake_quantize
from tritonsmith.compress.int8.quantize import quantize_static
from tritonsmith.compress.prepare import prepare_graph
from tritonsmith.compress.steps import Quantize
from tritonsmith.errors import CompressionError, UsageError
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples
from tritonsmith.train.fake_quantize import FakeActivation, FakeWeight
from tritonsmith.train.module import OnnxModule

Array = NDArray[Any]
WIDE = 100.0


def wide_model() -> onnx.ModelProto:
    """`conv_model` with channel 0 of conv_1 100 times as large, and its weights in conv_2 as much smaller.

    It computes the same, but one scale for all channels leaves the others 2 to 3 of 255 steps.
    """
    model = conv_model()
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, rows, factor in (
        ("scale1", np.s_[0], WIDE),
        ("shift1", np.s_[0], WIDE),
        ("k2", np.s_[:, 0], 1 / WIDE),
    ):
        array = numpy_helper.to_array(weights[name]).copy()
        array[rows] *= factor
        weights[name].CopyFrom(numpy_helper.from_array(array, name))
    return model


def material_of(model: onnx.ModelProto, folder: Path) -> Material:
    digits = split_digits()
    teacher = write_artifact(model, folder / "fp32.onnx")

    def part(name: str, start: int, stop: int) -> Samples:
        images, labels = digits.train_images[start:stop, None], digits.train_labels[start:stop]
        return load_samples(write_samples(folder / f"{name}.npz", images, labels), teacher.inputs)

    return Material(
        teacher=teacher,
        calibration=part("calibration", 0, 200),
        training=part("training", 0, 800),
        tuning=part("tuning", 800, 1200),
        metric=parse_metric("accuracy"),
        max_drop=0.01,
    )


def run(path: Path, *, optimized: bool = True) -> Array:
    """Outputs on the test images; without optimisation, each node computes what ONNX says, in floats."""
    options = SessionOptions()
    if not optimized:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    probabilities: Array = session.run(None, {"image": split_digits().test_images[:, None]})[0]
    return probabilities


def accuracy(path: Path) -> float:
    return float((run(path).argmax(axis=1) == split_digits().test_labels).mean())


def fake_of(artifact: Artifact, quantized: Path, folder: Path) -> FakeQuantized:
    prepared = prepare_graph(artifact.path, folder)
    return fake_quantize(onnx.load(str(prepared)), onnx.load(str(quantized)))


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
def test_training_sees_what_the_file_computes(tmp_path: Path, dialect: str) -> None:
    material = material_of(wide_model(), tmp_path)
    assert material.calibration is not None
    out = tmp_path / "int8.onnx"
    quantize_static(material.teacher, material.calibration, out, dialect=dialect)
    fake = fake_of(material.teacher, out, tmp_path)
    module = OnnxModule(fake.model, wraps=fake.wraps)
    images = torch.from_numpy(split_digits().test_images[:, None])
    with torch.no_grad():
        ours = module({"image": images})["probabilities"].numpy()

    told, floats = run(out, optimized=False), run(material.teacher.path)
    assert np.abs(floats - told).mean() > 1e-2
    # A sum that differs in its last bit may round the other way, and then moves one sample's outputs.
    assert (np.abs(ours - told).max(axis=1) < 1e-4).mean() > 0.98
    assert (ours.argmax(axis=1) == run(out).argmax(axis=1)).mean() > 0.98


def test_pairs_with_one_scale_learn_one(tmp_path: Path) -> None:
    material = material_of(conv_model(), tmp_path)
    assert material.calibration is not None
    out = tmp_path / "int8.onnx"
    quantize_static(material.teacher, material.calibration, out)
    fake = fake_of(material.teacher, out, tmp_path)

    points = {source: fake.activations[name] for name, source in fake.sources.items()}
    assert points["relu2"] is points["pooled"]  # MaxPool cannot change the scale
    assert points["relu1"] is not points["relu2"]
    low, high = points["image"].value_range()
    assert (low, high) == pytest.approx((0.0, 1.0))
    assert len(fake.weights) == 6  # three products, with their biases


def test_fine_tuning_wins_accuracy_back(tmp_path: Path) -> None:
    material = material_of(wide_model(), tmp_path)
    plain, tuned = (
        apply_step(
            Quantize(method="static", epochs=epochs, seed=3),
            material.teacher,
            material,
            tmp_path / f"int8-{epochs}.onnx",
            checkpoint=tmp_path / "work",
        )
        for epochs in (0, 5)
    )
    lost = accuracy(material.teacher.path) - accuracy(plain.path)
    assert lost > 0.05
    assert accuracy(tuned.path) > accuracy(plain.path) + lost / 2
    assert tuned.steps[-1].bytes_after == plain.steps[-1].bytes_after
    assert tuned.steps[-1].measured["int8_ops"] == 3
    finetuning = tuned.steps[-1].measured["finetuning"]
    assert isinstance(finetuning, dict)
    assert finetuning["used"]
    assert finetuning["metric_after"] > finetuning["metric_before"]


def test_mixed_precision_after_fine_tuning_keeps_the_budget_in_the_file(tmp_path: Path) -> None:
    """One batch at a huge rate ruins the weights; the layers are then chosen on those from before."""
    material = material_of(fragile_model(), tmp_path)
    assert material.training is not None
    assert material.tuning is not None
    few = replace(
        material.training,
        arrays={"image": material.training.arrays["image"][:32]},
        target=material.training.target[:32] if material.training.target is not None else None,
    )
    spec = Quantize(method="static", epochs=1, learning_rate=3.0, mixed=True)
    mixed = apply_step(
        spec,
        material.teacher,
        # Without tuning data for the training, it could not tell, and would take back the untrained weights.
        replace(material, training=few),
        tmp_path / "mixed.onnx",
        checkpoint=tmp_path / "work",
    )
    measured = mixed.steps[-1].measured["mixed"]
    assert isinstance(measured, dict)
    assert measured["passed"]
    assert measured["kept"] == [FRAGILE]
    graph = onnx.load(str(mixed.path)).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    (fragile,) = [node for node in graph.node if node.name == FRAGILE]
    assert kinds[fragile.input[1]] == onnx.TensorProto.FLOAT
    assert mixed.steps[-1].measured["int8_ops"] == 2
    images, labels = material.tuning.arrays["image"], material.tuning.target
    before, after = (
        InferenceSession(str(path)).run(None, {"image": images})[0].argmax(axis=1) == labels
        for path in (material.teacher.path, mixed.path)
    )
    assert before.mean() - after.mean() <= 0.01


def test_dynamic_int8_has_no_ranges_to_learn(tmp_path: Path) -> None:
    material = material_of(conv_model(), tmp_path)
    for spec, what in (
        (Quantize(method="dynamic", epochs=1), "fixed ranges of static INT8"),
        (Quantize(method="static", epochs=-1), "cannot be trained"),
        (Quantize(method="static", mixed=True), "needs a budget"),
        (Quantize(method="dynamic", mixed=True), "needs a budget"),
    ):
        with pytest.raises(UsageError, match=what):
            apply_step(
                spec,
                material.teacher,
                replace(material, max_drop=None),
                tmp_path / "out.onnx",
                checkpoint=tmp_path / "work",
            )
    assert not (tmp_path / "out.onnx").exists()


def test_a_weight_quantized_in_a_strange_way_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(conv_model(), tmp_path / "fp32.onnx")
    prepared = prepare_graph(artifact.path, tmp_path)
    out = tmp_path / "int8.onnx"
    writer_of(prepared)(frozenset(), out)
    model = onnx.load(str(out))
    for tensor in model.graph.initializer:
        if tensor.name == "w_zero_point":
            ones = np.ones(tuple(tensor.dims), np.int8)
            tensor.CopyFrom(numpy_helper.from_array(ones, tensor.name))
    with pytest.raises(CompressionError, match="weight 'w' is quantized in a way"):
        fake_quantize(onnx.load(str(prepared)), model)


def test_rounding_is_that_of_onnx_and_gradients_pass_it() -> None:
    x = torch.tensor([-0.3, 0.0, 0.24, 0.26, 0.5, 9.0], requires_grad=True)
    point = FakeActivation(0.1, 2, 0, 10, learned=True)
    y = point(x)
    # saturate(round(x / 0.1) + 2) in 0..10, minus 2, times 0.1
    assert y.tolist() == pytest.approx([-0.2, 0.0, 0.2, 0.3, 0.5, 0.8])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    # LSQ (arXiv 1902.08153, eq. 3): round(v) - v inside, the bound outside; times the step for its logarithm
    expected = 0.1 * (-2 + 0 + (2 - 2.4) + (3 - 2.6) + 0 + 8)
    assert float(point.logarithm.grad) == pytest.approx(expected, rel=1e-4)
    assert point.value_range() == pytest.approx((-0.2, 0.8))


def test_weights_have_a_step_for_each_channel() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.26], [0.0, 0.0, 0.0], [-8.0, 0.04, 4.0]])
    rounded = FakeWeight(0, 4)(weight)  # steps of 0.25, none and 2
    assert rounded.tolist() == [[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-8.0, 0.0, 4.0]]
    assert FakeWeight(None, 4)(weight).tolist()[0] == [0.0, 0.0, 0.0]  # one step of 2
