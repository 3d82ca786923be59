"""What an .npz of samples must be, and what is said of one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritonsmith.artifact import TensorSpec
from tritonsmith.client import Signature, Tensor
from tritonsmith.errors import SamplesError
from tritonsmith.samples import load_samples, load_served_samples

X = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "sequence"))
TEXT = TensorSpec(name="text", dtype="string", shape=("batch", 1))


def save(folder: Path, **arrays: Any) -> Path:
    path = folder / "samples.npz"
    np.savez(path, **arrays)
    return path


def test_arrays_by_name_with_labels_apart(tmp_path: Path) -> None:
    path = save(tmp_path, x=np.ones((3, 2), np.float32), target=np.array([0, 1, 1]))
    samples = load_samples(path, (X,), need_target=True)
    assert samples.count == 3
    assert list(samples.arrays) == ["x"]
    assert samples.target is not None
    assert samples.target.tolist() == [0, 1, 1]


def test_a_model_may_have_an_input_named_target(tmp_path: Path) -> None:
    target = TensorSpec(name="target", dtype="float32", shape=("batch",))
    samples = load_samples(save(tmp_path, target=np.ones(2, np.float32)), (target,))
    assert list(samples.arrays) == ["target"]
    assert samples.target is None


def test_numbers_are_converted_only_where_no_value_changes(tmp_path: Path) -> None:
    samples = load_samples(save(tmp_path, ids=np.array([[1, 2]], np.uint8)), (IDS,))
    assert samples.arrays["ids"].dtype == np.int64
    with pytest.raises(SamplesError, match="'ids' is float64"):
        load_samples(save(tmp_path, ids=np.array([[1.0, 2.0]])), (IDS,))


def test_unicode_becomes_utf8_bytes(tmp_path: Path) -> None:
    samples = load_samples(save(tmp_path, text=np.array([["größe"]])), (TEXT,))
    assert samples.arrays["text"].tolist() == [["größe".encode()]]


def test_without_a_batch_axis_the_first_axis_still_counts_samples(tmp_path: Path) -> None:
    scalar = TensorSpec(name="x", dtype="float32", shape=())
    assert load_samples(save(tmp_path, x=np.ones(4, np.float32)), (scalar,), batched=False).count == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.ones((1, 2))}, "lacks an array for 'x'"),
        ({"x": np.ones((1, 2)), "y": np.ones(1)}, "an array that no input takes: 'y'"),
        ({"x": np.ones((1, 3))}, "'x' does not fit the model's input"),
        ({"x": np.ones(2)}, "'x' does not fit the model's input"),
        ({"x": np.ones((0, 2))}, "'x' has no samples"),
        ({"x": np.array([[1, np.nan]])}, "'x' holds NaN or infinity"),
        ({"x": np.array([[1, np.inf]])}, "'x' holds NaN or infinity"),
        ({"x": np.array([[1, 1e300]])}, "'x' holds a number beyond float32"),
        ({"x": np.ones((2, 2)), "target": np.ones(3)}, "arrays of unequal length"),
        ({"x": np.ones((2, 2), complex)}, "'x' is complex128"),
        ({"x": np.array([["a", "b"]])}, "'x' is <U1"),
        ({"x": np.ones((1, 2))}, "has no labels"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplesError, match=message):
        load_samples(save(tmp_path, **arrays), (X,), need_target=message == "has no labels")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SamplesError, match=r"cannot be read as \.npz"):
        load_samples(path, (X,))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"text"])
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(SamplesError, match=r"cannot be read as \.npz"):
        load_samples(path, (X,))


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "samples.npy"
    np.save(path, np.ones(3))
    with pytest.raises(SamplesError, match="found: a single array"):
        load_samples(path, (X,))


def signature(*inputs: Tensor, max_batch_size: int) -> Signature:
    return Signature(
        model="m", version="", max_batch_size=max_batch_size, inputs=inputs, outputs=(), config={}
    )


@pytest.mark.parametrize(("shape", "size"), [((-1, 1), 8), ((1,), 0)])
def test_served_samples_get_the_axis_that_triton_adds(
    tmp_path: Path, shape: tuple[int, ...], size: int
) -> None:
    served = signature(Tensor(name="x", datatype="FP32", shape=shape), max_batch_size=size)
    samples = load_served_samples(save(tmp_path, x=np.ones(5, np.float32)), served)
    assert samples.arrays["x"].shape == (5, 1)


def test_served_samples_may_lack_an_optional_input(tmp_path: Path) -> None:
    inputs = (
        Tensor(name="x", datatype="FP32", shape=(-1, 2)),
        Tensor(name="scale", datatype="FP32", shape=(-1, 1), optional=True),
    )
    path = save(tmp_path, x=np.ones((5, 2), np.float32))
    assert list(load_served_samples(path, signature(*inputs, max_batch_size=8)).arrays) == ["x"]
