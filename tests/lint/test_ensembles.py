"""Ensembles whose steps, tensors or batches do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import DOUBLE, add_double, add_linear, add_model, ensemble, findings_of, step

TWICE = (step("double", "in", "once"), step("double", "once", "out"))
CASES = [
    (ensemble(), "has no steps"),
    (ensemble(step("dubble", "in", "out")), "no model 'dubble'"),
    (ensemble(step("double", "in", "out", names=("x", "z"))), "no output 'z'"),
    (ensemble(step("double", "inn", "out")), "written by no step"),
    (ensemble(step("double", "in", "once"), step("double", "in", "out")), "never used"),
    (ensemble(step("double", "in", "out"), step("double", "in", "out")), "written twice"),
    (
        ensemble(step("double", "in", "once"), step("linear", "once", "out", names=("features", "scores"))),
        "different shapes",
    ),
    (ensemble(*TWICE, dims="[4]"), "another shape than its steps"),
    (ensemble(*TWICE).replace("FP32", "FP16", 1), "another data type than its steps"),
    (ensemble(*TWICE, size=8), "takes larger batches than its step"),
    (ensemble(step("double", "in", "out"), step("double", "a", "b"), step("double", "b", "a")), "cycle"),
]


@pytest.mark.parametrize(("config", "words"), CASES, ids=[case[1] for case in CASES])
def test_a_mistake_in_an_ensemble(tmp_path: Path, config: str, words: str) -> None:
    add_double(tmp_path)
    add_linear(tmp_path)
    add_model(tmp_path, "twice", config)
    found = findings_of(tmp_path)
    assert {(finding.severity, finding.model, finding.place) for finding in found} == {
        ("error", "twice", "config.pbtxt")
    }
    assert words in " ".join(finding.what for finding in found)


@pytest.mark.parametrize("steps", [TWICE, TWICE[::-1]])
def test_steps_may_stand_in_any_order(tmp_path: Path, steps: tuple[str, ...]) -> None:
    add_double(tmp_path)
    add_model(tmp_path, "twice", ensemble(*steps))
    assert findings_of(tmp_path) == ()


def test_a_batch_is_held_against_the_steps_of_the_same_target(tmp_path: Path) -> None:
    """On the GPU machine the step takes 2, where the ensemble, without a target of its own, takes 4."""
    folder = add_double(tmp_path)
    add_model(tmp_path, "twice", ensemble(*TWICE))
    (folder / "configs").mkdir()
    (folder / "configs" / "gpu.pbtxt").write_text(DOUBLE.replace("max_batch_size: 4", "max_batch_size: 2"))
    found = findings_of(tmp_path)
    assert found
    assert {finding.model for finding in found} == {"twice"}
    assert all("configs/gpu.pbtxt" in str(finding.found) for finding in found)
    (tmp_path / "twice" / "configs").mkdir()
    (tmp_path / "twice" / "configs" / "gpu.pbtxt").write_text(ensemble(*TWICE, size=2))
    assert findings_of(tmp_path) == ()
