"""Zeros: which weights become zero, that they stay so, in which layout, and what is honestly said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from digits_models import write_artifact
from onnx_models import model_from_text
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.int8.quantize import quantize_static
from tritonsmith.compress.pruning.sparsify import apply_sparsify
from tritonsmith.compress.steps import Sparsify
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.samples import load_samples

Array = NDArray[Any]

# A convolution of 3 and one of 16 input channels, a Gemm with its weights transposed, and a MatMul.
NETWORK = """net (float[batch, 3, 8, 8] image) => (float[batch, 10] logits) {
    h0 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, first, first_bias)
    h1 = Relu (h0)
    h2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (h1, second)
    h3 = Relu (h2)
    h4 = GlobalAveragePool (h3)
    h5 = Flatten (h4)
    h6 = Gemm <transB = 1> (h5, third, third_bias)
    h7 = Relu (h6)
    logits = MatMul (h7, fourth)
}"""
SHAPES = {
    "first": (16, 3, 3, 3),
    "first_bias": (16,),
    "second": (32, 16, 3, 3),
    "third": (24, 32),
    "third_bias": (24,),
    "fourth": (24, 10),
}
PRODUCTS = ("first", "second", "third", "fourth")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    random = np.random.default_rng(5)
    weights = {
        name: random.normal(0, 1 + 3 * (name == "second"), shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    model = model_from_text(NETWORK, weights)
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    return write_artifact(model, tmp_path / "fp32.onnx")


def material_of(artifact: Artifact, tmp_path: Path, *, count: int = 64, labels: bool = True) -> Material:
    random = np.random.default_rng(6)
    arrays: dict[str, Any] = {"image": random.random((count, 3, 8, 8), dtype=np.float32)}
    if labels:
        arrays["target"] = random.integers(0, 10, count)
    np.savez(tmp_path / "samples.npz", **arrays)
    samples = load_samples(tmp_path / "samples.npz", artifact.inputs)
    return Material(teacher=artifact, calibration=samples, training=samples)


def sparsify(artifact: Artifact, material: Material, tmp_path: Path, **options: Any) -> Artifact:
    out = tmp_path / "sparse.onnx"
    return apply_sparsify(Sparsify(**options), artifact, material, out, checkpoint=tmp_path / "checkpoint")


def weights_of(path: Path) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def is_two_of_four(weight: Array) -> bool:
    """NVIDIA's own loop over KCRS weights, from the TensorRT Developer Guide."""
    out, channels, height, width = weight.shape
    return all(
        np.count_nonzero(weight[k, c : c + 4, r, s]) <= 2
        for k in range(out)
        for r in range(height)
        for s in range(width)
        for c in range(0, channels, 4)
    )


def test_the_smallest_weights_of_each_layer_become_zero(artifact: Artifact, tmp_path: Path) -> None:
    sparse = sparsify(artifact, Material(teacher=artifact), tmp_path, sparsity=0.75)
    before, after = weights_of(artifact.path), weights_of(sparse.path)
    for name in PRODUCTS:
        limit = np.sort(np.abs(before[name]), axis=None)[before[name].size * 3 // 4]
        expected = np.where(np.abs(before[name]) >= limit, before[name], 0)
        np.testing.assert_array_equal(after[name], expected)
    for name in ("first_bias", "third_bias"):
        np.testing.assert_array_equal(after[name], before[name])
    step = sparse.steps[-1]
    assert step.bytes_after == step.bytes_before
    assert step.measured["sparsity"] == 0.75
    assert step.measured["weights"] == sum(before[name].size for name in PRODUCTS)
    assert "no bytes" in str(step.measured["note"])
    assert "not measured" in str(step.measured["note"])


def test_globally_the_layer_of_large_weights_keeps_more(artifact: Artifact, tmp_path: Path) -> None:
    sparse = sparsify(artifact, Material(teacher=artifact), tmp_path, sparsity=0.5, scope="global")
    after = weights_of(sparse.path)
    shares = {name: float((after[name] == 0).mean()) for name in PRODUCTS}
    zeros = sum(int((after[name] == 0).sum()) for name in PRODUCTS)
    assert zeros == sum(after[name].size for name in PRODUCTS) // 2
    assert shares["second"] < 0.5 < min(shares["first"], shares["third"], shares["fourth"])
    assert sparse.steps[-1].measured["sparsity_by_layer"] == {
        node: round(shares[name], 4)
        for node, name in zip(("node0", "node2", "node6", "node8"), PRODUCTS, strict=True)
    }


def test_two_of_four_lie_along_what_products_sum_over(artifact: Artifact, tmp_path: Path) -> None:
    sparse = sparsify(artifact, material_of(artifact, tmp_path), tmp_path, pattern="2:4")
    before, after = weights_of(artifact.path), weights_of(sparse.path)
    np.testing.assert_array_equal(after["first"], before["first"])
    measured = sparse.steps[-1].measured
    assert measured["left_alone"] == ("node0: 3 values to sum over are no multiple of 4",)
    assert measured["two_of_four_share"] == 1.0
    assert measured["sparsity"] == 0.5
    assert is_two_of_four(after["second"])
    assert is_two_of_four(after["third"][:, :, None, None])  # [N, K]
    assert is_two_of_four(after["fourth"].T[:, :, None, None])  # [K, N]
    four = np.abs(before["second"][3, 4:8, 1, 2])
    kept = np.flatnonzero(after["second"][3, 4:8, 1, 2])
    assert set(kept) == set(np.argsort(four)[2:])
    note = str(measured["note"])
    assert "SPARSE_WEIGHTS" in note
    assert "onnxruntime" in note
    assert "times as fast" in note


def test_zeros_stay_while_the_others_train(artifact: Artifact, tmp_path: Path) -> None:
    material = material_of(artifact, tmp_path)
    plain = sparsify(artifact, material, tmp_path, pattern="2:4")
    untrained = weights_of(plain.path)
    trained = weights_of(sparsify(artifact, material, tmp_path, pattern="2:4", epochs=2).path)
    for name in ("second", "third", "fourth"):
        np.testing.assert_array_equal(trained[name] == 0, untrained[name] == 0)
        assert not np.allclose(trained[name], untrained[name])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_survive_int8(artifact: Artifact, tmp_path: Path, pattern: str) -> None:
    material = material_of(artifact, tmp_path)
    sparse = sparsify(artifact, material, tmp_path, pattern=pattern)
    assert material.calibration is not None
    quantized = quantize_static(sparse, material.calibration, tmp_path / "int8.onnx")
    eight = [array for array in weights_of(quantized.path).values() if array.dtype == np.int8]
    for name in ("second", "third", "fourth"):
        zeros = weights_of(sparse.path)[name] == 0
        (stored,) = [array for array in eight if array.shape in (zeros.shape, zeros.T.shape)]
        same = stored if stored.shape == zeros.shape else stored.T
        assert not same[zeros].any()
        assert same.any()


def test_weights_that_others_read_or_that_are_kept_stay(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weights = {
        "table": random.normal(size=(12, 16)).astype(np.float32),
        "dense": random.normal(size=(16, 16)).astype(np.float32),
        "kept": random.normal(size=(16, 16)).astype(np.float32),
        "small": random.normal(size=(16, 3)).astype(np.float32),
    }
    text = """net (int64[batch] ids) => (float[batch, 15] logits) {
        words = Gather (table, ids)
        a = MatMul (words, dense)
        b = MatMul (a, kept)
        scores = MatMul (b, small)
        turned = Transpose <perm = [1, 0]> (table)
        again = MatMul (b, turned)
        logits = Concat <axis = 1> (scores, again)
    }"""
    model = model_from_text(text, weights)
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    artifact = write_artifact(model, tmp_path / "fp32.onnx")
    sparse = sparsify(artifact, Material(teacher=artifact), tmp_path, keep=("node2",))
    before, after = weights_of(artifact.path), weights_of(sparse.path)
    changed = {name for name in weights if not np.array_equal(before[name], after[name])}
    assert changed == {"dense"}
    alone = sparse.steps[-1].measured["left_alone"]
    assert alone == (
        "node2: it is kept",
        "node3: 48 weights are too few",
        "node5: its weights are computed from others",
    )


def test_requests_that_make_no_sense(artifact: Artifact, tmp_path: Path) -> None:
    material = Material(teacher=artifact)
    for options, words in (
        ({"sparsity": 1.0}, "share"),
        ({"pattern": "4:8"}, "4:8"),
        ({"pattern": "2:4", "sparsity": 0.6}, "half zeros"),
        ({"scope": "net"}, "net"),
        ({"keep": ("nowhere",)}, "nowhere"),
        ({"keep": ("node0", "node2", "node6", "node8")}, "no weights that can be set to zero"),
        ({"sparsity": 0.99999, "scope": "global"}, "would empty"),
    ):
        with pytest.raises(CompressionError, match=words):
            sparsify(artifact, material, tmp_path, **options)
    with pytest.raises(SamplesError):
        sparsify(artifact, material, tmp_path, epochs=1)
    assert not (tmp_path / "sparse.onnx").exists()


def test_an_engine_that_cannot_run_here_is_not_timed(artifact: Artifact, tmp_path: Path) -> None:
    material = replace(material_of(artifact, tmp_path), engine="tensorrt")
    sparse = sparsify(artifact, material, tmp_path, pattern="2:4")
    assert sparse.steps[-1].measured["speed"] is None
    assert "time on tensorrt not measured" in str(sparse.steps[-1].measured["note"])
