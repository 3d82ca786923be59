"""Loss by layer: the layer that was made fragile is found, by files that ONNX Runtime's own tool wrote."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from digits_models import make_model, split_digits, write_artifact, write_samples
from fragile_models import FRAGILE, fragile_model, writer_of
from tritonsmith.compress.int8.sensitivity import (
    ROW_COLUMNS,
    LayerSensitivity,
    Sensitivity,
    find_layers,
    measure_sensitivity,
    plot_sensitivity,
    sensitivity_rows,
    sqnr_db,
)
from tritonsmith.compress.int8.static import QUANTIZED_OPS
from tritonsmith.compress.prepare import prepare_graph
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples

Write = Callable[[frozenset[str], Path], None]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    artifact = write_artifact(fragile_model(), tmp_path / "fragile.onnx")
    return prepare_graph(artifact.path, tmp_path)


@pytest.fixture
def tuning(tmp_path: Path) -> Samples:
    digits = split_digits()
    artifact = write_artifact(fragile_model(), tmp_path / "signature.onnx")
    path = write_samples(
        tmp_path / "tuning.npz", digits.train_images[200:400, None], digits.train_labels[200:400]
    )
    return load_samples(path, artifact.inputs)


@pytest.fixture
def write(prepared: Path) -> Write:
    return writer_of(prepared)


def measure(write: Write, prepared: Path, tuning: Samples, folder: Path, most_runs: int) -> Sensitivity:
    layers = find_layers(prepared, QUANTIZED_OPS)
    metric = parse_metric("accuracy")
    return measure_sensitivity(
        write, layers, prepared, tuning, folder, batched=True, metric=metric, most_runs=most_runs
    )


def test_the_fragile_layer_is_the_worst(
    tmp_path: Path, write: Write, prepared: Path, tuning: Samples
) -> None:
    sensitivity = measure(write, prepared, tuning, tmp_path, 32)

    worst, *others = sensitivity.layers
    assert worst.node == FRAGILE
    assert worst.bytes == (32 * 16 * 9 + 32) * 4  # the bias is that of the folded BatchNormalization
    assert {layer.node for layer in others} == {"conv_1", "dense"}
    assert all(layer.sqnr_db > worst.sqnr_db + 20 for layer in others)
    assert worst.drop > 0.02 > max(layer.drop for layer in others)
    assert sensitivity.samples == 200


def test_with_few_runs_groups_are_measured_and_then_the_layers_of_the_worst(
    tmp_path: Path, write: Write, prepared: Path, tuning: Samples
) -> None:
    layers = find_layers(prepared, QUANTIZED_OPS)
    runs: list[frozenset[str]] = []

    def counted(kept: frozenset[str], path: Path) -> None:
        runs.append(kept)
        write(kept, path)

    # Groups of two: dense alone, and the two convolutions, of which one is fragile.
    sensitivity = measure_sensitivity(counted, layers, prepared, tuning, tmp_path, batched=True, most_runs=2)
    assert len(runs) == 3
    assert [layer.node for layer in sensitivity.layers] == ["conv_1", "conv_2", "dense"]
    assert [layer.sqnr_db is None for layer in sensitivity.layers] == [False, True, True]
    assert sensitivity.metric is None


def test_layers_take_what_only_passes_their_values_on(prepared: Path) -> None:
    layers = find_layers(prepared, QUANTIZED_OPS)
    assert [(layer.node, layer.op, layer.followers) for layer in layers] == [
        ("conv_1", "Conv", ("relu_1",)),
        ("conv_2", "Conv", ("relu_2", "pool", "flatten")),
        ("dense", "Gemm", ()),
    ]


def test_a_bias_belongs_to_its_product_and_an_input_s_reshape_to_its_reader(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", "b"], ["sum"], name="bias"),
        helper.make_node("Add", ["sum", "flat"], ["probabilities"], name="residual"),
    ]
    weights = {"w": np.eye(64), "b": np.zeros(64)}
    model = make_model(nodes, weights, image_shape=["batch", 8, 8], output=("probabilities", ["batch", 64]))
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    layers = find_layers(path, ("Add", "Flatten", "MatMul"))

    assert [(layer.node, layer.followers, layer.bytes) for layer in layers] == [
        ("product", ("flatten", "bias"), 64 * 64 * 4),
        ("residual", (), 0),
    ]
    spared = find_layers(path, ("Add", "Flatten", "MatMul"), frozenset({"residual"}))
    assert [layer.node for layer in spared] == ["product"]


def test_signal_to_noise_is_that_of_the_worst_output() -> None:
    expected = {"a": np.full((4, 2), 10.0, np.float32), "b": np.ones((4, 1), np.float32)}
    found = {"a": expected["a"] + 1, "b": expected["b"] + np.float32(0.01)}
    assert sqnr_db(expected, found) == pytest.approx(20.0)  # 10 log10(10^2 / 1^2)
    assert sqnr_db(expected, expected) == math.inf
    assert sqnr_db(expected, {**found, "b": np.full((4, 1), np.nan, np.float32)}) == -math.inf


def test_a_table_and_a_plot_say_what_stays() -> None:
    layers = (
        LayerSensitivity(node="stem", op="Conv", sqnr_db=9.5, drop=0.25, bytes=640),
        LayerSensitivity(node="head", op="Gemm", sqnr_db=math.inf, drop=0.0, bytes=10),
        LayerSensitivity(node="tail", op="Add", sqnr_db=None, drop=None, bytes=0),
    )
    sensitivity = Sensitivity(layers=layers, samples=5, metric="accuracy").keeping(frozenset({"stem"}))

    rows = sensitivity_rows(sensitivity)
    assert [len(row) for row in rows] == [len(ROW_COLUMNS)] * 3
    assert rows[0] == ("stem", "Conv", "9.5", "+0.2500", "640", "floating point")
    assert rows[2] == ("tail", "Add", "not measured", "-", "0", "INT8")
    records = sensitivity.json()["layers"]
    assert isinstance(records, list)
    assert [record["sqnr_db"] for record in records] == [9.5, None, None]
    svg = plot_sensitivity(sensitivity)
    assert "stem (Conv)" in svg
    assert "tail" not in svg
    assert plot_sensitivity(sensitivity) == svg
