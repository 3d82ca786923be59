"""Structured pruning: the sliced graph computes what is left and costs what was asked; refusals are clear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from digits_models import mlp_model, split_digits, write_artifact
from keras_models import randomised
from onnx_models import model_from_text
from prunable_models import MODELS, chain
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.cost import cost_of
from tritonsmith.compress.pruning.prune import apply_prune
from tritonsmith.compress.pruning.slicer import plan_pruning, prune_channels
from tritonsmith.compress.steps import Prune
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.ingest import convert
from tritonsmith.samples import load_samples

Arrays = dict[str, NDArray[Any]]


def run(model: onnx.ModelProto, inputs: Arrays) -> NDArray[Any]:
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, inputs)[0]
    return result


def inputs_of(model: onnx.ModelProto, batch: int) -> Arrays:
    random = np.random.default_rng(batch)
    arrays: Arrays = {}
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in weights:
            continue
        axes = value.type.tensor_type.shape.dim
        shape = [{"batch": batch, "length": 7}.get(axis.dim_param, axis.dim_value) for axis in axes]
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            arrays[value.name] = random.integers(0, 20, size=shape)
        else:
            arrays[value.name] = random.normal(size=shape).astype(np.float32)
    return arrays


def choose_half(sizes: Mapping[str, int], *, uneven: bool) -> dict[str, NDArray[np.int64]]:
    """Half of each group's channels, at random; uneven, one less of every second group."""
    random = np.random.default_rng(3)
    counts = {
        name: max(1, size // 2 - (index % 2 if uneven else 0))
        for index, (name, size) in enumerate(sizes.items())
    }
    return {name: np.sort(random.choice(sizes[name], counts[name], replace=False)) for name in sizes}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other take longer than these tiny products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_half_can_go(model: onnx.ModelProto, *, uneven: bool = False) -> onnx.ModelProto:
    """What reads a channel is set to zero, so that the channel adds nothing; then it is removed."""
    model, plan = plan_pruning(model)
    kept = choose_half({group.name: group.size for group in plan.prunable}, uneven=uneven)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for group in plan.prunable:
        readers = [member for member in group.members if member.reads]
        assert readers
        gone = np.setdiff1d(np.arange(group.size), kept[group.name])
        for member in readers:
            array = onnx.numpy_helper.to_array(tensors[member.tensor]).copy()
            np.moveaxis(array, member.axis, 0)[np.isin(member.channels, gone)] = 0
            tensors[member.tensor].CopyFrom(onnx.numpy_helper.from_array(array, member.tensor))

    sliced = prune_channels(model, plan, kept)

    onnx.checker.check_model(sliced, full_check=True)
    assert sliced.ByteSize() < model.ByteSize()
    for batch in (1, 3):
        inputs = inputs_of(model, batch)
        expected = run(model, inputs)
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(run(sliced, inputs), expected, atol=1e-5, rtol=1e-5)
    return sliced


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_channels_whose_readers_are_zero_can_go(name: str, uneven: bool) -> None:
    check_half_can_go(MODELS[name](), uneven=uneven)


def test_a_mobile_net_of_keras_is_halved(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    image = keras.Input((12, 12, 3), name="image")
    stem = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu6")(image)
    hidden = layers.BatchNormalization()(layers.Conv2D(24, 1)(stem))
    hidden = layers.ZeroPadding2D(1)(layers.ReLU(6.0)(hidden))
    hidden = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3)(hidden)))
    hidden = layers.Add()([stem, layers.Conv2D(8, 1)(hidden)])
    hidden = layers.Dense(16, activation="relu")(layers.Flatten()(layers.AveragePooling2D(2)(hidden)))
    model = randomised(keras.Model(image, layers.Dense(4, name="scores")(hidden)))
    model.save(tmp_path / "model.keras")
    artifact = convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")
    sliced = check_half_can_go(onnx.load(str(artifact.path)))
    dims = sorted(tuple(tensor.dims) for tensor in sliced.graph.initializer if len(tensor.dims) == 4)
    assert dims == [(4, 3, 3, 3), (4, 12, 1, 1), (12, 1, 3, 3), (12, 4, 1, 1)]
    # 3 x 3 places of 4 channels are flattened, in the order of Keras.
    assert {(36, 8), (8, 4)} <= {tuple(tensor.dims) for tensor in sliced.graph.initializer}


def test_an_encoder_of_pytorch_loses_half_its_heads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    module = torch.nn.Sequential(layer, torch.nn.Linear(16, 3)).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, (torch.randn(2, 5, 16),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    artifact = convert(str(tmp_path / "model.pt2"), tmp_path / "model.onnx")
    model = onnx.load(str(artifact.path))
    kinds = {(group.kind, group.size) for group in plan_pruning(model)[1].prunable}
    assert kinds == {("heads", 4), ("neurons", 32)}
    check_half_can_go(model)


@pytest.mark.parametrize("goal", ["flops", "parameters"])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_goal_is_met_and_measured_on_the_file(tmp_path: Path, goal: str, share: float) -> None:
    artifact = write_artifact(MODELS["dense_blocks"](), tmp_path / "model.onnx")
    pruned = prune(artifact, Prune(**{goal: share}, round_to=1), tmp_path)
    before, after = cost_of(artifact.path), cost_of(pruned.path)
    measured = pruned.steps[-1].measured

    assert share - 0.1 < getattr(after, goal) / getattr(before, goal) <= share
    assert measured[f"{goal}_before"] == getattr(before, goal)
    assert measured[f"{goal}_after"] == getattr(after, goal)
    assert (pruned.inputs, pruned.outputs) == (artifact.inputs, artifact.outputs)
    assert pruned.steps[-1].bytes_after == pruned.path.stat().st_size < artifact.path.stat().st_size


def test_sizes_are_multiples_and_small_groups_stay(tmp_path: Path) -> None:
    artifact = write_artifact(MODELS["residual"](), tmp_path / "model.onnx")
    pruned = prune(artifact, Prune(ratio=0.5, round_to=8), tmp_path)
    groups = pruned.steps[-1].measured["groups"]
    assert groups == {"s": [16, 8], "a1": [8, 8], "p": [24, 16], "y": [4, 4]}


def test_heads_go_whole(tmp_path: Path) -> None:
    artifact = write_artifact(MODELS["transformer"](), tmp_path / "model.onnx")
    pruned = prune(artifact, Prune(ratio=0.5, round_to=16), tmp_path)
    dims = {tensor.name: list(tensor.dims) for tensor in onnx.load(str(pruned.path)).graph.initializer}
    assert (dims["wq"], dims["wk"], dims["wv"], dims["wo"]) == ([32, 16], [32, 16], [32, 16], [16, 32])
    assert (dims["wi"], dims["wf"]) == ([32, 32], [32, 32])


def test_the_smallest_weights_go_first(tmp_path: Path) -> None:
    model = chain()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    loud = np.array([1, 4, 5, 11])
    for name, axis in {"w1": 1, "w2": 1}.items():
        array = onnx.numpy_helper.to_array(tensors[name]).copy()
        np.moveaxis(array, axis, 0)[np.setdiff1d(np.arange(16), loud)] *= 1e-4
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    artifact = write_artifact(model, tmp_path / "model.onnx")
    pruned = prune(artifact, Prune(ratio=0.75, round_to=4, keep=("e",)), tmp_path)
    left = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(str(pruned.path)).graph.initializer
    }
    np.testing.assert_array_equal(
        left["w1"], onnx.numpy_helper.to_array({t.name: t for t in model.graph.initializer}["w1"])[:, loud]
    )
    assert left["w2"].shape == (24, 4)


@pytest.mark.parametrize("labelled", [True, False])
def test_taylor_removes_what_nothing_depends_on(tmp_path: Path, labelled: bool) -> None:
    """Large weights that reach the output times zero: magnitude keeps them, Taylor terms do not."""
    random = np.random.default_rng(2)
    w1, w2 = (random.normal(size=shape).astype(np.float32) for shape in ((4, 8), (8, 3)))
    used = np.array([0, 3, 6])
    w1[:, np.setdiff1d(np.arange(8), used)] *= 100
    w2[np.setdiff1d(np.arange(8), used)] = 0
    model = model_from_text(
        "idle (float[batch, 4] x) => (float[batch, 3] y)"
        " { a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) y = Softmax(c) }",
        {"w1": w1, "w2": w2},
    )
    artifact = write_artifact(model, tmp_path / "model.onnx")
    arrays = {"x": random.normal(size=(40, 4)).astype(np.float32)}
    if labelled:
        arrays["target"] = random.integers(0, 3, size=40)
    np.savez(tmp_path / "data.npz", **arrays)
    data = load_samples(tmp_path / "data.npz", artifact.inputs)
    material = Material(teacher=artifact, training=data if labelled else None, calibration=data)
    spec = Prune(ratio=0.6, round_to=1, importance="taylor")
    pruned = apply_prune(spec, artifact, material, tmp_path / "out.onnx", checkpoint=tmp_path / "work")
    inputs = {"x": arrays["x"]}
    left = onnx.load(str(pruned.path))
    assert {t.name: list(t.dims) for t in left.graph.initializer} == {"w1": [4, 4], "w2": [4, 3]}
    np.testing.assert_allclose(run(left, inputs), run(model, inputs), atol=1e-5)


def test_training_between_iterations_wins_accuracy_back(tmp_path: Path, one_thread: None) -> None:
    artifact = write_artifact(mlp_model(), tmp_path / "model.onnx")
    (name,) = (spec.name for spec in artifact.inputs)
    digits = split_digits()
    shape = (-1, *[int(axis) for axis in artifact.inputs[0].shape[1:]])
    np.savez(
        tmp_path / "train.npz",
        **{name: digits.train_images.reshape(shape), "target": digits.train_labels},
    )
    training = load_samples(tmp_path / "train.npz", artifact.inputs)
    material = Material(teacher=artifact, training=training)
    lines: list[str] = []

    def accuracy(spec: Prune, out: str) -> float:
        pruned = apply_prune(
            spec, artifact, material, tmp_path / out, checkpoint=tmp_path / "work", say=lines.append
        )
        outputs = run(onnx.load(str(pruned.path)), {name: digits.test_images.reshape(shape)})
        return float((outputs.argmax(axis=1) == digits.test_labels).mean())

    spec = Prune(flops=0.3, round_to=4, iterations=2)
    assert accuracy(spec, "bare.onnx") < 0.8
    assert accuracy(replace(spec, epochs=4, learning_rate=1e-2), "trained.onnx") > 0.9
    assert cost_of(tmp_path / "trained.onnx").flops <= 0.3 * cost_of(artifact.path).flops
    assert any(line.startswith("iteration 2 of 2") for line in lines)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (Prune(), "exactly one of flops, parameters and ratio"),
        (Prune(flops=0.5, ratio=0.5), "exactly one of flops, parameters and ratio"),
        (Prune(flops=1.5), "no share that may be left"),
        (Prune(ratio=1.0), "would empty every layer"),
        (Prune(ratio=0.98), "would empty 2 of 2 groups"),
        (Prune(flops=0.001), "cannot be brought to"),
        (Prune(ratio=0.5, keep=("nothing",)), "no node is named 'nothing'"),
        (Prune(ratio=0.5, keep=("a", "d")), "has no channels that can be pruned"),
        (Prune(ratio=0.5, round_to=0), "at least 1"),
        (Prune(ratio=0.5, importance="luck"), "no importance is named 'luck'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_message(tmp_path: Path, spec: Prune, part: str) -> None:
    artifact = write_artifact(chain(), tmp_path / "model.onnx")
    with pytest.raises(CompressionError) as caught:
        prune(artifact, spec, tmp_path)
    assert part in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_taylor_without_data_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(chain(), tmp_path / "model.onnx")
    with pytest.raises(SamplesError, match="needs samples"):
        prune(artifact, Prune(ratio=0.5, importance="taylor"), tmp_path)


def test_what_stays_whole_is_listed_with_its_reason(tmp_path: Path) -> None:
    artifact = write_artifact(chain(), tmp_path / "model.onnx")
    lines: list[str] = []
    material = Material(teacher=artifact)
    spec = Prune(ratio=0.5, keep=("c",))
    pruned = apply_prune(
        spec, artifact, material, tmp_path / "out.onnx", checkpoint=tmp_path / "work", say=lines.append
    )
    assert pruned.steps[-1].measured["frozen"] == {"a": "asked to be kept", "y": "output 'y'"}
    assert pruned.steps[-1].measured["groups"] == {"a": [16, 16], "d": [24, 16], "y": [3, 3]}
    assert "stays whole: y: output 'y'" in lines


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    model = model_from_text("plain (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }")
    artifact = write_artifact(model, tmp_path / "model.onnx")
    with pytest.raises(CompressionError, match="no channels that can be pruned"):
        prune(artifact, Prune(ratio=0.5), tmp_path)


def prune(artifact: Artifact, spec: Prune, folder: Path) -> Artifact:
    material = Material(teacher=artifact)
    return apply_prune(spec, artifact, material, folder / "out.onnx", checkpoint=folder / "work")
