"""Mixed precision: the fragile layer alone stays in floating point, and the file keeps the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import InferenceSession

from digits_models import mlp_model, split_digits, write_artifact, write_samples
from fragile_models import FRAGILE, fragile_model, writer_of
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material, apply_step
from tritonsmith.compress.int8.mixed import Mixed, budget_of, choose_mixed
from tritonsmith.compress.int8.sensitivity import find_layers
from tritonsmith.compress.int8.static import QUANTIZED_OPS
from tritonsmith.compress.prepare import prepare_graph
from tritonsmith.compress.steps import Quantize
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import load_samples


@pytest.fixture
def material(tmp_path: Path) -> Material:
    digits = split_digits()
    teacher = write_artifact(fragile_model(), tmp_path / "fragile.onnx")
    parts = {"calibration": slice(0, 200), "tuning": slice(200, 800)}
    loaded = {
        name: load_samples(
            write_samples(
                tmp_path / f"{name}.npz", digits.train_images[part, None], digits.train_labels[part]
            ),
            teacher.inputs,
        )
        for name, part in parts.items()
    }
    return Material(teacher=teacher, metric=parse_metric("accuracy"), max_drop=0.01, **loaded)


def choose(material: Material, artifact: Artifact, folder: Path, said: list[str]) -> Mixed:
    prepared = prepare_graph(artifact.path, folder)
    layers = find_layers(prepared, QUANTIZED_OPS)
    budget = budget_of(material)
    return choose_mixed(writer_of(prepared), layers, prepared, folder, budget=budget, say=said.append)


def test_the_fragile_layer_alone_stays_in_floating_point(tmp_path: Path, material: Material) -> None:
    mixed = choose(material, material.teacher, tmp_path, [])
    assert mixed.kept == (FRAGILE,)
    assert mixed.nodes == {FRAGILE, "relu_2", "pool", "flatten"}
    assert mixed.passed
    assert mixed.int8_drop > 0.02
    assert mixed.drop <= 0.01
    assert mixed.sensitivity is not None
    assert [layer.node for layer in mixed.sensitivity.layers if layer.kept] == [FRAGILE]
    assert mixed.measured()["kept"] == [FRAGILE]


def test_a_wide_budget_keeps_nothing_and_measures_no_layer(tmp_path: Path, material: Material) -> None:
    mixed = choose(replace(material, max_drop=0.99), material.teacher, tmp_path, [])
    assert (mixed.kept, mixed.passed, mixed.sensitivity, mixed.trials) == ((), True, None, 1)
    assert mixed.drop == mixed.int8_drop


def test_what_the_budget_does_not_need_is_quantized_again(tmp_path: Path, material: Material) -> None:
    """Where the order blames an innocent layer most, it is taken back once the guilty one is known."""
    folder = tmp_path / "more"
    folder.mkdir()
    prepared = prepare_graph(material.teacher.path, folder)
    write = writer_of(prepared)
    layers = find_layers(prepared, QUANTIZED_OPS)
    innocent = next(layer for layer in layers if layer.node == "dense")

    def slandering(kept: frozenset[str], path: Path) -> None:
        alone = frozenset(name for layer in layers for name in layer.nodes) - innocent.nodes
        write(kept, path)
        if kept == alone:  # dense alone answers the opposite
            model = onnx.load(str(path))
            for tensor in model.graph.initializer:
                if tensor.name == "w_quantized":
                    opposite = -numpy_helper.to_array(tensor)
                    tensor.CopyFrom(numpy_helper.from_array(opposite, tensor.name))
            onnx.save(model, str(path))

    said: list[str] = []
    mixed = choose_mixed(slandering, layers, prepared, folder, budget=budget_of(material), say=said.append)
    assert mixed.sensitivity is not None
    assert [layer.node for layer in mixed.sensitivity.layers[:2]] == ["dense", FRAGILE]
    assert mixed.kept == (FRAGILE,)
    assert any("dense can be INT8 after all" in line for line in said)


def test_a_budget_that_no_choice_keeps_still_leaves_a_result(tmp_path: Path, material: Material) -> None:
    exact = replace(material, metric=parse_metric("max-abs-error"), max_drop=0.0)
    said: list[str] = []
    mixed = choose(exact, material.teacher, tmp_path, said)
    assert not mixed.passed
    assert 0 < mixed.drop < mixed.int8_drop
    assert FRAGILE in mixed.kept
    assert len(mixed.kept) < 3
    assert "even with 2 of 3 layers in floating point" in mixed.reason
    assert any(line.startswith("the budget cannot be met") for line in said)


def test_a_loss_from_before_is_not_blamed_on_layers(tmp_path: Path, material: Material) -> None:
    model = fragile_model()
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    spoilt = numpy_helper.to_array(head).copy()
    spoilt[:, 3] = 0.0  # no 3 is found any more
    head.CopyFrom(numpy_helper.from_array(spoilt, "w"))
    worse = write_artifact(model, tmp_path / "worse.onnx")

    mixed = choose(material, worse, tmp_path, [])
    assert not mixed.passed
    assert mixed.kept == ()
    assert mixed.sensitivity is None
    assert "in floating point the model already loses" in mixed.reason


def test_dynamic_int8_leaves_the_fragile_product_alone(tmp_path: Path) -> None:
    """Hidden unit 0 is always zero, and huge weights on it in dense_2 take the one scale of each column."""
    digits = split_digits()
    model = mlp_model()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, where, value in (("w1", np.s_[:, 0], 0.0), ("b1", np.s_[0], -1.0), ("w2", np.s_[0], 500.0)):
        array = numpy_helper.to_array(tensors[name]).copy()
        array[where] = value
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    teacher = write_artifact(model, tmp_path / "mlp.onnx")
    images = digits.train_images.reshape(-1, 64)
    path = write_samples(tmp_path / "tuning.npz", images[:600], digits.train_labels[:600])
    tuning = load_samples(path, teacher.inputs)
    material = Material(teacher=teacher, tuning=tuning, metric=parse_metric("accuracy"), max_drop=0.01)
    spec = Quantize(method="dynamic", mixed=True)
    mixed = apply_step(spec, teacher, material, tmp_path / "mixed.onnx", checkpoint=tmp_path)

    record = mixed.steps[-1].measured["mixed"]
    assert isinstance(record, dict)
    assert (record["kept"], record["passed"]) == (["dense_2"], True)
    assert record["int8_drop"] > 0.3
    assert mixed.steps[-1].measured["int8_ops"] == 1
    before, after = (
        InferenceSession(str(artifact.path)).run(None, {"image": tuning.arrays["image"]})[0].argmax(axis=1)
        for artifact in (teacher, mixed)
    )
    assert (before == tuning.target).mean() - (after == tuning.target).mean() <= 0.01


def test_there_must_be_something_to_choose_by(tmp_path: Path, material: Material) -> None:
    with pytest.raises(UsageError, match="needs a budget"):
        budget_of(replace(material, max_drop=None))
    with pytest.raises(UsageError, match="needs a budget"):
        budget_of(replace(material, metric=None))
    with pytest.raises(SamplesError, match="needs tuning data"):
        budget_of(replace(material, tuning=None))
    assert material.tuning is not None
    with pytest.raises(SamplesError, match="no labels"):
        budget_of(replace(material, tuning=replace(material.tuning, target=None)))
    with pytest.raises(CompressionError, match="no layer"):
        choose_mixed(writer_of(tmp_path), [], tmp_path, tmp_path, budget=budget_of(material))
