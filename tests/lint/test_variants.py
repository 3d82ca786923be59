"""Targets against the default, and against their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import DOUBLE, LINEAR, add_double, add_linear, findings_of, only


def add_target(folder: Path, config: str, name: str = "gpu") -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{name}.pbtxt").write_text(config)


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("[3]", "[4]", "another input"),
        ('"x"', '"z"', "another input"),
        ("TYPE_FP32", "TYPE_FP64", "another input"),
        ("max_batch_size: 4", "max_batch_size: 8", "max_batch_size does not fit"),
    ],
)
def test_a_target_is_the_same_model_for_a_client(tmp_path: Path, right: str, wrong: str, words: str) -> None:
    add_target(add_double(tmp_path), DOUBLE.replace(right, wrong, 1))
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.place) == ("error", "configs/gpu.pbtxt")
    assert words in finding.what


def test_a_target_may_batch_less_and_run_elsewhere(tmp_path: Path) -> None:
    smaller = DOUBLE.replace("max_batch_size: 4", "max_batch_size: 2 instance_group { count: 2 }")
    add_target(add_double(tmp_path), smaller)
    assert findings_of(tmp_path) == ()


def test_a_targets_own_mistakes_are_found(tmp_path: Path) -> None:
    folder = add_linear(tmp_path)
    add_target(folder, LINEAR + 'default_model_filename: "gpu.fp16.onnx"')
    finding = only(findings_of(tmp_path))
    assert finding.place == "1/gpu.fp16.onnx"
    assert "configs/gpu.pbtxt" in finding.what
    assert only(findings_of(tmp_path, target="gpu")) == finding


def test_a_target_that_cannot_be_parsed(tmp_path: Path) -> None:
    add_target(add_double(tmp_path), "backend: python")
    assert only(findings_of(tmp_path)).place == "configs/gpu.pbtxt"
