"""What calibration data is refused, and that honest data is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from digits_models import split_digits
from tritonsmith.artifact import TensorSpec
from tritonsmith.compress.calibration import CHUNK_SAMPLES, check_calibration, chunks, row_hashes
from tritonsmith.errors import SamplesError
from tritonsmith.samples import Samples, load_samples

IMAGE = (TensorSpec(name="image", dtype="float32", shape=("batch", 1, 8, 8)),)


def samples(path: Path, images: NDArray[np.float32]) -> Samples:
    np.savez(path, image=images.astype(np.float32))
    return load_samples(path, IMAGE)


@pytest.fixture
def evaluation(tmp_path: Path) -> Samples:
    return samples(tmp_path / "evaluation.npz", split_digits().test_images[:, None])


def test_other_real_samples_pass_without_a_word(tmp_path: Path, evaluation: Samples) -> None:
    said: list[str] = []
    real = samples(tmp_path / "real.npz", split_digits().train_images[:64, None])
    check_calibration(real, evaluation, say=said.append)
    assert said == []


def test_a_shared_row_is_refused_and_counted(tmp_path: Path, evaluation: Samples) -> None:
    digits = split_digits()
    mixed = np.concatenate([digits.train_images[:30], digits.test_images[5:8]])[:, None]
    with pytest.raises(SamplesError, match="shares samples with the evaluation data") as caught:
        check_calibration(samples(tmp_path / "mixed.npz", mixed), evaluation)
    assert caught.value.found == "3 of 33, first at row 30"


def test_labels_do_not_hide_a_shared_row(tmp_path: Path) -> None:
    images = split_digits().test_images[:20, None]
    np.savez(tmp_path / "a.npz", image=images, target=np.zeros(20, np.int64))
    np.savez(tmp_path / "b.npz", image=images)
    first, second = (load_samples(tmp_path / name, IMAGE) for name in ("a.npz", "b.npz"))
    assert first.sha256 != second.sha256
    assert row_hashes(first) == row_hashes(second)


@pytest.mark.parametrize("scale", [16.0, 0.1])
def test_another_range_is_refused(tmp_path: Path, evaluation: Samples, scale: float) -> None:
    scaled = samples(tmp_path / "scaled.npz", split_digits().train_images[:64, None] * scale)
    with pytest.raises(SamplesError, match="does not look like the evaluation data") as caught:
        check_calibration(scaled, evaluation)
    assert f"values from 0 to {scale:g} against 0 to 1" in str(caught.value.found)


def test_noise_is_refused(tmp_path: Path, evaluation: Samples) -> None:
    noise = np.random.default_rng(0).uniform(size=(64, 1, 8, 8))
    with pytest.raises(SamplesError, match="does not look like the evaluation data") as caught:
        check_calibration(samples(tmp_path / "noise.npz", noise), evaluation)
    assert "noise" in str(caught.value.found)


def test_noise_without_neighbours_is_refused_by_its_means(tmp_path: Path) -> None:
    table = (TensorSpec(name="features", dtype="float32", shape=("batch", 3)),)
    rng = np.random.default_rng(0)
    real = rng.normal([-0.8, 0.0, 0.9], 0.1, size=(200, 3)).astype(np.float32)
    np.savez(tmp_path / "real.npz", features=real[:100])
    np.savez(tmp_path / "other.npz", features=real[100:])
    np.savez(tmp_path / "noise.npz", features=rng.uniform(-1, 1, size=(100, 3)).astype(np.float32))
    evaluation, other, noise = (
        load_samples(tmp_path / f"{name}.npz", table) for name in ("real", "other", "noise")
    )
    check_calibration(other, evaluation)
    with pytest.raises(SamplesError, match="does not look like"):
        check_calibration(noise, evaluation)


def test_few_samples_and_a_constant_channel_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    images = np.random.default_rng(0).uniform(size=(5, 3, 8, 8)).astype(np.float32)
    images[:, 1] = 0.5
    np.savez(tmp_path / "few.npz", image=images)
    spec = (TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8)),)
    check_calibration(load_samples(tmp_path / "few.npz", spec), say=said.append)
    assert len(said) == 2
    assert "only 5 samples" in said[0]
    assert "channels [1] of input 'image' are constant" in said[1]


def test_samples_are_fed_in_chunks_that_bound_memory(tmp_path: Path) -> None:
    images = split_digits().train_images[:70, None]
    data = samples(tmp_path / "data.npz", images)
    parts = [part["image"] for part in chunks(data, batched=True)]
    assert [len(part) for part in parts] == [CHUNK_SAMPLES, CHUNK_SAMPLES, 70 - 2 * CHUNK_SAMPLES]
    np.testing.assert_array_equal(np.concatenate(parts), images)
    assert [part["image"].shape for part in chunks(data, batched=False)] == [(1, 8, 8)] * 70

    large = Samples(
        path=tmp_path, sha256="", arrays={"image": np.zeros((3, 224, 224, 3), np.float32)}, target=None
    )
    assert [len(part["image"]) for part in chunks(large, batched=True)] == [1, 1, 1]
