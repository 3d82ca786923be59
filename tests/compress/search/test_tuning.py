"""Data to choose on: given, held back by content, or asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from digits_models import mlp_model, split_digits, write_artifact, write_samples
from tritonsmith.artifact import Artifact
from tritonsmith.compress.calibration import row_hashes
from tritonsmith.compress.chain import Material
from tritonsmith.compress.search.tuning import with_tuning
from tritonsmith.errors import SamplesError
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples

ACCURACY, COSINE = parse_metric("accuracy"), parse_metric("cosine")


@pytest.fixture
def mlp(tmp_path: Path) -> Artifact:
    return write_artifact(mlp_model(), tmp_path / "mlp.onnx")


def samples(path: Path, mlp: Artifact, rows: slice, *, labels: bool = True) -> Samples:
    digits = split_digits()
    images = digits.train_images.reshape(-1, 64)[rows]
    return load_samples(
        write_samples(path, images, digits.train_labels[rows] if labels else None), mlp.inputs
    )


def test_a_fifth_of_the_training_data_is_held_back_from_all_that_steps_see(
    tmp_path: Path, mlp: Artifact
) -> None:
    training = samples(tmp_path / "training.npz", mlp, slice(0, 500))
    calibration = samples(tmp_path / "calibration.npz", mlp, slice(400, 600), labels=False)
    said: list[str] = []
    found = with_tuning(
        Material(teacher=mlp, training=training, calibration=calibration), ACCURACY, say=said.append
    )
    assert found.tuning is not None
    assert found.training is not None
    assert found.calibration is not None
    tuning, rest, ranges = (
        set(row_hashes(part)) for part in (found.tuning, found.training, found.calibration)
    )
    everything = set(row_hashes(training))
    assert len(tuning) == round(0.2 * len(everything))
    assert tuning | rest == everything
    assert not tuning & rest
    assert not tuning & ranges
    assert said == [f"choosing on {found.tuning.count} of the 500 samples of training.npz, held back"]
    first = found.tuning.arrays["image"][0]
    row = next(index for index, image in enumerate(training.arrays["image"]) if (image == first).all())
    assert training.target is not None
    assert found.tuning.target is not None
    assert found.tuning.target[0] == training.target[row]


def test_the_same_data_are_held_back_again_and_other_data_have_another_hash(
    tmp_path: Path, mlp: Artifact
) -> None:
    training = samples(tmp_path / "training.npz", mlp, slice(0, 500))
    once, again = (with_tuning(Material(teacher=mlp, training=training), ACCURACY) for _ in range(2))
    other = with_tuning(Material(teacher=mlp, training=replace(training, sha256="other")), ACCURACY)
    assert once.tuning is not None
    assert again.tuning is not None
    assert once.training is not None
    assert other.tuning is not None
    assert once.tuning.sha256 == again.tuning.sha256
    assert len({once.tuning.sha256, once.training.sha256, other.tuning.sha256, training.sha256}) == 4


def test_equal_samples_stay_on_one_side(tmp_path: Path, mlp: Artifact) -> None:
    images = np.repeat(split_digits().train_images.reshape(-1, 64)[:200], 3, axis=0)
    path = write_samples(tmp_path / "twice.npz", images, np.repeat(split_digits().train_labels[:200], 3))
    found = with_tuning(Material(teacher=mlp, training=load_samples(path, mlp.inputs)), ACCURACY)
    assert found.tuning is not None
    assert found.training is not None
    assert not set(row_hashes(found.tuning)) & set(row_hashes(found.training))
    assert found.tuning.count + found.training.count == 600


def test_calibration_data_do_where_the_metric_needs_no_labels(tmp_path: Path, mlp: Artifact) -> None:
    calibration = samples(tmp_path / "calibration.npz", mlp, slice(0, 200), labels=False)
    found = with_tuning(Material(teacher=mlp, calibration=calibration), COSINE)
    assert found.tuning is not None
    assert found.calibration is not None
    assert (found.tuning.count, found.calibration.count) == (40, 160)


def test_tuning_data_that_are_given_are_left_as_they_are(tmp_path: Path, mlp: Artifact) -> None:
    tuning = samples(tmp_path / "tuning.npz", mlp, slice(0, 50))
    material = Material(
        teacher=mlp, tuning=tuning, calibration=samples(tmp_path / "c.npz", mlp, slice(50, 99))
    )
    assert with_tuning(material, ACCURACY) is material


def test_what_to_give_is_said_where_there_is_nothing_to_choose_on(tmp_path: Path, mlp: Artifact) -> None:
    with pytest.raises(SamplesError, match="nothing to choose on") as nothing:
        with_tuning(Material(teacher=mlp), ACCURACY)
    assert "--tuning" in (nothing.value.fix or "")
    bare = samples(tmp_path / "bare.npz", mlp, slice(0, 300), labels=False)
    with pytest.raises(SamplesError, match="nothing to choose on") as unlabelled:
        with_tuning(Material(teacher=mlp, calibration=bare), ACCURACY)
    assert unlabelled.value.found == "calibration data without labels"
    with pytest.raises(SamplesError, match="has no labels"):
        with_tuning(Material(teacher=mlp, tuning=bare), ACCURACY)
    few = samples(tmp_path / "few.npz", mlp, slice(0, 40))
    with pytest.raises(SamplesError, match="too few samples"):
        with_tuning(Material(teacher=mlp, training=few), ACCURACY)
