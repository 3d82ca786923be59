"""The training loop: it learns, resumes after a real kill, and refuses what it cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import training_data
from digits_models import split_digits
from training_data import SPEC, make_material, train_student, untrained_model
from tritonsmith.errors import CompressionError, RepositoryError, SamplesError
from tritonsmith.train.data import Padding, draw_batches
from tritonsmith.train.loop import rate_at, train
from tritonsmith.train.module import OnnxModule

SCRIPT = Path(training_data.__file__ or "")


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


def test_a_student_learns_from_labels_and_teacher(tmp_path: Path) -> None:
    module, report = train_student(tmp_path, tmp_path / "checkpoint")

    digits = split_digits()
    images = torch.from_numpy(digits.test_images.reshape(-1, 64))
    found = module({"image": images})["probabilities"].argmax(1).numpy()
    assert (found == digits.test_labels).mean() > 0.85
    assert report.metric_before is not None
    assert report.metric_before < 0.3
    assert report.metric_after is not None
    assert report.metric_after > 0.85
    assert report.last_loss < report.first_loss / 2
    assert (report.epochs, report.steps, report.samples) == (4, 80, 600)
    assert report.resumed_from is None


def test_a_kill_costs_at_most_one_epoch_and_changes_nothing(tmp_path: Path) -> None:
    whole, _ = train_student(tmp_path / "whole", tmp_path / "whole" / "checkpoint")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    resumed, report = train_student(folder, folder / "checkpoint")

    assert report.resumed_from == 2
    assert report.steps == 80
    assert_same(state_of(resumed), state_of(whole))


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first, _ = train_student(tmp_path, tmp_path / "checkpoint")
    second, report = train_student(tmp_path, tmp_path / "checkpoint")

    assert report.resumed_from == SPEC.epochs
    assert_same(state_of(first), state_of(second))


@pytest.mark.parametrize("change", ["options", "weights", "data"])
def test_the_checkpoint_of_another_request_is_not_used(tmp_path: Path, change: str) -> None:
    material = make_material(tmp_path)
    spec = replace(SPEC, epochs=1)
    model = untrained_model()
    train(OnnxModule(model), material, spec, teacher=material.teacher, checkpoint=tmp_path / "c")
    if change == "options":
        spec = replace(spec, seed=8)
    elif change == "data":
        other = make_material(tmp_path / "other", labelled=False).training
        material = replace(material, training=other)
    else:
        model = untrained_model(hidden=32)

    report = train(OnnxModule(model), material, spec, teacher=material.teacher, checkpoint=tmp_path / "c")

    assert report.resumed_from is None


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    material, spec = make_material(tmp_path), replace(SPEC, epochs=1)
    train(OnnxModule(untrained_model()), material, spec, teacher=material.teacher, checkpoint=tmp_path)
    (file,) = tmp_path.glob("training-*.pt")
    file.write_bytes(file.read_bytes()[:1000])

    with pytest.raises(RepositoryError, match="damaged"):
        train(OnnxModule(untrained_model()), material, spec, teacher=material.teacher, checkpoint=tmp_path)


def test_training_that_makes_it_worse_is_not_taken(tmp_path: Path) -> None:
    """A good model, told wrong labels: the weights from before win on the tuning data."""
    material = make_material(tmp_path)
    assert material.training is not None
    assert material.training.target is not None
    wrong = replace(material.training, target=(material.training.target + 1) % 10)
    material = replace(material, training=wrong)
    module = OnnxModule(untrained_model())
    train(module, make_material(tmp_path), SPEC, teacher=material.teacher, checkpoint=tmp_path / "good")
    before = state_of(module)

    spec = replace(SPEC, epochs=2, logits=0.0)
    report = train(module, material, spec, teacher=material.teacher, checkpoint=tmp_path / "bad")

    assert report.best_epoch == 0
    assert report.metric_after == report.metric_before
    assert_same(state_of(module), before)


def test_hidden_states_of_other_widths_are_projected(tmp_path: Path) -> None:
    material = make_material(tmp_path, labelled=False)
    module = OnnxModule(untrained_model(hidden=16))
    spec = replace(SPEC, logits=0.0, hidden=1.0)

    report = train(
        module,
        material,
        spec,
        teacher=material.teacher,
        checkpoint=tmp_path,
        hidden=[("active", "active")],
    )

    assert report.last_loss < 0.8 * report.first_loss
    assert {tuple(weight.shape) for weight in module.parameters()} == {(64, 16), (16,), (16, 10), (10,)}


def test_a_diverging_training_says_so(tmp_path: Path) -> None:
    material = make_material(tmp_path)
    module = OnnxModule(untrained_model(), wraps={"hidden": lambda hidden: hidden * float("inf")})

    with pytest.raises(CompressionError, match="diverged") as refusal:
        train(module, material, SPEC, teacher=material.teacher, checkpoint=tmp_path)
    assert refusal.value.fix == "a lower learning rate: 0.001 instead of 0.01"


def test_calibration_data_do_where_there_are_no_training_data(tmp_path: Path) -> None:
    material = make_material(tmp_path)
    material = replace(material, calibration=material.training, training=None)
    report = train(
        OnnxModule(untrained_model()), material, SPEC, teacher=material.teacher, checkpoint=tmp_path
    )
    assert report.samples == 600

    spec = replace(SPEC, labels=1.0)
    with pytest.raises(SamplesError, match="nothing to train on"):
        train(OnnxModule(untrained_model()), material, spec, teacher=material.teacher, checkpoint=tmp_path)
    bare = replace(material, calibration=None)
    with pytest.raises(SamplesError, match="nothing to train on") as refusal:
        train(OnnxModule(untrained_model()), bare, SPEC, teacher=material.teacher, checkpoint=tmp_path)
    assert "give training data" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "these options"),
        ({"learning_rate": float("nan")}, "these options"),
        ({"logits": -1.0}, "this weight"),
        ({"logits": 0.0, "labels": 0.0}, "nothing to learn"),
        ({"hidden": 1.0}, "share no hidden states"),
    ],
)
def test_requests_without_sense_are_refused(tmp_path: Path, changes: dict[str, float], message: str) -> None:
    material = make_material(tmp_path)
    spec = replace(SPEC, **changes)  # type: ignore[arg-type]
    module = OnnxModule(untrained_model())
    module.tensors = frozenset()

    with pytest.raises(CompressionError, match=message):
        train(module, material, spec, teacher=material.teacher, checkpoint=tmp_path)


def test_labels_are_needed_where_they_are_asked_for(tmp_path: Path) -> None:
    material = make_material(tmp_path, labelled=False)

    with pytest.raises(SamplesError, match="no labels"):
        train(
            OnnxModule(untrained_model()),
            material,
            replace(SPEC, labels=1.0),
            teacher=material.teacher,
            checkpoint=tmp_path,
        )


def test_a_module_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    module = OnnxModule(untrained_model()).requires_grad_(False)
    material = make_material(tmp_path)

    with pytest.raises(CompressionError, match="no weights that can be trained"):
        train(module, material, SPEC, teacher=material.teacher, checkpoint=tmp_path)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [rate_at(step, 200) for step in range(201)]

    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[105] == pytest.approx(0.5)  # half way down the cosine
    assert rates[200] == pytest.approx(0.0)


def test_batches_are_seeded_and_keep_padding_short() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    padding = Padding(axis="sequence", inputs=frozenset(), lengths=lengths)

    batches = draw_batches(500, 20, seed=1, epoch=0, padding=padding)

    again = draw_batches(500, 20, seed=1, epoch=0, padding=padding)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    other = draw_batches(500, 20, seed=1, epoch=1, padding=padding)
    assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(500))
    tokens = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert tokens < 1.15 * lengths.sum()  # random batches of 20 take about twice that
