"""Distillation on real digits: students of fewer channels or blocks, given or derived."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from digits_models import (
    Array,
    conv_model,
    make_model,
    split_digits,
    write_artifact,
    write_samples,
)
from onnx_models import model_from_text, write_model
from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.distillation.distill import apply_distill
from tritonsmith.compress.steps import Distill
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import load_samples

SPEC = Distill(epochs=4, batch_size=32, learning_rate=5e-3)


@pytest.fixture
def material(tmp_path: Path) -> Material:
    """A convolutional teacher; 800 labelled digits to train on, 200 to tune on, all 1,000 without labels."""
    teacher = write_artifact(conv_model(), tmp_path / "teacher.onnx")
    digits = split_digits()
    images, labels = digits.train_images[:, None], digits.train_labels
    training = write_samples(tmp_path / "training.npz", images[:800], labels[:800])
    tuning = write_samples(tmp_path / "tuning.npz", images[800:1000], labels[800:1000])
    calibration = write_samples(tmp_path / "calibration.npz", images[:800])
    return Material(
        teacher=teacher,
        training=load_samples(training, teacher.inputs),
        tuning=load_samples(tuning, teacher.inputs),
        calibration=load_samples(calibration, teacher.inputs),
        metric=parse_metric("accuracy"),
    )


def accuracy(artifact: Artifact) -> float:
    """On the digits that nothing here has seen."""
    digits = split_digits()
    found = open_session(artifact.path).run({"image": digits.test_images[:, None]})["probabilities"]
    return float((found.argmax(axis=1) == digits.test_labels).mean())


def distill(spec: Distill, material: Material, out: Path) -> Artifact:
    return apply_distill(spec, material.teacher, material, out, checkpoint=out.parent / "checkpoint")


@pytest.mark.parametrize("labelled", [True, False])
def test_half_the_channels_learn_from_the_teacher(tmp_path: Path, material: Material, labelled: bool) -> None:
    if not labelled:
        material = replace(material, training=None)
    spec = replace(SPEC, width=0.5)

    student = distill(spec, material, tmp_path / "model.onnx")

    step = student.steps[-1]
    assert step.measured["groups"] == {"conv_1": [16, 8], "conv_2": [32, 16]}
    assert step.bytes_after == student.path.stat().st_size
    assert step.bytes_after < step.bytes_before / 2
    assert step.measured["metric_before"] < 0.5  # type: ignore[operator]
    assert step.measured["metric_after"] > 0.9  # type: ignore[operator]
    assert accuracy(material.teacher) > 0.97
    assert accuracy(student) > 0.9
    assert (student.inputs, student.outputs) == (material.teacher.inputs, material.teacher.outputs)
    assert list(tmp_path.glob(".*staging")) == []


def given_student(*, image: str = "image", classes: int = 10, batch: str = "batch") -> onnx.ModelProto:
    """An untrained perceptron with the teacher's signature, or nearly so."""
    random = np.random.default_rng(2)
    weights: dict[str, Array] = {
        "w1": random.normal(0, 0.1, (64, 24)).astype(np.float32),
        "w2": random.normal(0, 0.1, (24, classes)).astype(np.float32),
        "zeros": np.zeros(24, np.float32),
    }
    return model_from_text(
        f"student (float[{batch}, 1, 8, 8] {image}) => (float[{batch}, {classes}] probabilities) {{"
        f" flat = Flatten({image})  a = MatMul(flat, w1)  b = Add(a, zeros)  c = Relu(b)"
        " d = Add(c, zeros)  e = MatMul(d, w2)  probabilities = Softmax(e) }",
        weights,
    )


def test_a_given_student_takes_the_place_of_the_artifact(tmp_path: Path, material: Material) -> None:
    source = write_model(tmp_path / "student.onnx", given_student())
    spec = replace(SPEC, student=str(source), batch_size=16)

    student = distill(spec, material, tmp_path / "model.onnx")

    assert accuracy(student) > 0.85
    assert student.steps[-1].measured["metric_before"] < 0.3  # type: ignore[operator]
    assert (student.inputs, student.outputs) == (material.teacher.inputs, material.teacher.outputs)
    # Simplification drops zeros that are added, that is, the biases of an untrained model.
    graph = onnx_model.load_model(student.path).graph
    biases = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 1]
    assert sorted(bias.size for bias in biases if bias.dtype == np.float32) == [10, 24]
    assert all(bias.any() for bias in biases)


def test_a_student_with_another_signature_is_refused_with_all_differences(
    tmp_path: Path, material: Material
) -> None:
    source = write_model(tmp_path / "student.onnx", given_student(image="picture", classes=12))

    with pytest.raises(CompressionError, match="does not fit the teacher") as refusal:
        distill(replace(SPEC, student=str(source)), material, tmp_path / "model.onnx")

    assert "the student lacks image: float32[batch, 1, 8, 8]" in str(refusal.value.found)
    assert "the teacher has no picture: float32[batch, 1, 8, 8]" in str(refusal.value.found)
    assert "probabilities: float32[batch, 12] is not probabilities: float32[batch, 10]" in str(
        refusal.value.found
    )
    assert not (tmp_path / "model.onnx").exists()


def deep_model(blocks: int = 4) -> onnx.ModelProto:
    """The digits through a stem, residual blocks of two products, and a head; with random weights."""
    helper = onnx.helper
    random = np.random.default_rng(5)
    weights: dict[str, Array] = {
        "stem": random.normal(0, 0.2, (64, 32)),
        "head": random.normal(0, 0.2, (32, 10)),
    }
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "stem"], ["s0"]),
    ]
    for i in range(blocks):
        weights |= {f"w{i}": random.normal(0, 0.1, (32, 32)), f"v{i}": random.normal(0, 0.1, (32, 32))}
        nodes += [
            helper.make_node("MatMul", [f"s{i}", f"w{i}"], [f"a{i}"]),
            helper.make_node("Relu", [f"a{i}"], [f"b{i}"]),
            helper.make_node("MatMul", [f"b{i}", f"v{i}"], [f"c{i}"]),
            helper.make_node("Add", [f"s{i}", f"c{i}"], [f"s{i + 1}"]),
        ]
    nodes += [
        helper.make_node("MatMul", [f"s{blocks}", "head"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    return make_model(nodes, weights, image_shape=["batch", 1, 8, 8])


def test_half_the_blocks_learn_the_states_between_them(tmp_path: Path, material: Material) -> None:
    deep = write_artifact(deep_model(), tmp_path / "deep.onnx")
    deep = apply_distill(
        replace(SPEC, logits=0.0, labels=1.0),
        deep,
        replace(material, teacher=deep),
        tmp_path / "trained.onnx",
        checkpoint=tmp_path / "first",
    )
    assert accuracy(deep) > 0.9
    material = replace(material, teacher=deep, training=None)

    shallow = distill(replace(SPEC, depth=0.5, hidden=1.0), material, tmp_path / "model.onnx")

    assert shallow.steps[-1].measured["blocks"] == {"s0": [4, 2]}
    assert shallow.path.stat().st_size < 0.75 * deep.path.stat().st_size
    assert accuracy(shallow) > 0.9


def test_both_shares_must_be_shares_of_something(tmp_path: Path, material: Material) -> None:
    with pytest.raises(CompressionError, match="repeats no block"):
        distill(replace(SPEC, depth=0.5), material, tmp_path / "model.onnx")
    with pytest.raises(CompressionError, match="is no share"):
        distill(replace(SPEC, width=1.5), material, tmp_path / "model.onnx")
    with pytest.raises(CompressionError, match="a student is given"):
        distill(replace(SPEC, width=0.5, student="student.onnx"), material, tmp_path / "model.onnx")


def test_a_quantized_model_is_not_trained(tmp_path: Path, material: Material) -> None:
    material = replace(material, teacher=replace(material.teacher, precision="int8"))

    with pytest.raises(CompressionError, match="not FP32"):
        distill(SPEC, material, tmp_path / "model.onnx")


def test_without_any_data_there_is_nothing_to_learn_from(tmp_path: Path, material: Material) -> None:
    bare = replace(material, training=None, calibration=None)

    with pytest.raises(SamplesError, match="nothing to train on"):
        distill(replace(SPEC, width=0.5), bare, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
