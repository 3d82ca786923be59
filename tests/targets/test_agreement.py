"""How far a plan may be from its ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from plan_orders import write_order
from publishing import tensor
from tritonsmith.artifact import TensorSpec
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import PlanError
from tritonsmith.targets.agreement import Agreement, Case, Difference, cases_of, compare, tolerance_of

FLOAT = tensor("y", "float32", "batch", 8)
CASE = Case(name="best", profile=0, axes={"batch": 64})
RANDOM = np.random.default_rng(3)
WANT = RANDOM.normal(size=(64, 8)).astype(np.float32)


def difference(
    found: np.ndarray, want: np.ndarray, precision: str, spec: TensorSpec = FLOAT, *, tf32: bool = False
) -> Difference:
    tolerance = tolerance_of(precision, tf32=tf32)
    (result,) = compare(CASE, (spec,), {"y": found}, {"y": want}, batched=True, tolerance=tolerance)
    return result


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8", "int4"])
def test_equal_answers_agree(precision: str) -> None:
    result = difference(WANT, WANT.copy(), precision)
    assert result.refusal is None
    assert (result.worst, result.relative, result.values_count) == (0, 0, 512)
    assert result.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (2e-5, {"fp32", "tf32", "fp16", "bf16", "int8"}),
        (1e-3, {"tf32", "fp16", "bf16", "int8"}),  # what TF32 does, and plain FP32 does not
        (7e-3, {"fp16", "bf16", "int8"}),
        (5e-2, {"bf16", "int8"}),
        (0.1, {"int8"}),
        (0.2, set()),
    ],
)
def test_the_tolerance_follows_the_precision(error: float, passing: set[str]) -> None:
    """Each row's error is `error` times as long as the row, in a direction across it."""
    across = np.roll(WANT, 1, axis=1) * np.tile([1, -1], 4)
    across -= WANT * (np.sum(across * WANT, 1) / np.sum(WANT * WANT, 1))[:, None]
    across *= (np.linalg.norm(WANT, axis=1) / np.linalg.norm(across, axis=1))[:, None]
    found = WANT + error * across
    results = {name: difference(found, WANT, name) for name in ("fp32", "fp16", "bf16", "int8")}
    results["tf32"] = difference(found, WANT, "fp32", tf32=True)
    assert {name for name, result in results.items() if result.refusal is None} == passing
    assert results["int8"].relative == pytest.approx(error, rel=0.2)


def test_one_wrong_row_in_a_large_batch_shows() -> None:
    found = WANT.copy()
    found[63] *= 0.5  # an eighth of that over the whole batch
    result = difference(found, WANT, "int8")
    assert result.refusal is not None
    assert "relative error" in result.refusal
    assert "at batch 64" in result.refusal


def test_nan_on_one_side_is_refused_and_on_both_is_not() -> None:
    want = WANT.copy()
    want[0, 0] = np.nan
    want[1, 1] = np.inf
    assert difference(want.copy(), want, "fp32").refusal is None
    for found in (WANT, np.where(np.isinf(want), -np.inf, want)):
        assert "finite on one side" in str(difference(found, want, "int8").refusal)


def test_masks_say_nothing_about_the_scale() -> None:
    """Beside a value of -1e9 an error of 1 would be nothing."""
    want = WANT.copy()
    want[:, 0] = -1e9
    found = want.copy()
    found[:, 1] += 1
    assert difference(found, want, "fp32").refusal is not None
    assert difference(want.copy(), want, "fp32").refusal is None


def test_whole_numbers_are_counted() -> None:
    spec = dataclasses.replace(FLOAT, dtype="int64")
    want = np.arange(512).reshape(64, 8)
    found = want.copy()
    found[:2] += 1  # 16 of 512
    assert difference(found, want, "int8", spec).refusal is None
    assert "96.88% of the values" in str(difference(found, want, "fp16", spec).refusal)


def test_other_shapes_and_missing_outputs_are_refused() -> None:
    assert "shape [64, 7]" in str(difference(WANT[:, :7], WANT, "int8").refusal)
    tolerance = tolerance_of("int8", tf32=False)
    (result,) = compare(CASE, (FLOAT,), {"z": WANT}, {"y": WANT}, batched=True, tolerance=tolerance)
    assert result.refusal == "the plan has no output 'y'"


def test_nothing_compared_is_no_agreement() -> None:
    nothing = np.full((64, 8), np.nan, np.float32)
    agreement = Agreement(differences=(difference(nothing, nothing.copy(), "fp32"),), reference="x.onnx")
    assert agreement.refusal == "nothing could be compared: no output has a finite value"


def test_an_unknown_precision_has_no_tolerance() -> None:
    with pytest.raises(PlanError, match="'fp6'"):
        tolerance_of("fp6", tf32=False)


def test_cases_are_the_smallest_best_and_largest_of_each_profile(tmp_path: Path) -> None:
    first = {
        "batch": AxisRange(minimum=1, best=8, maximum=8),
        "length": AxisRange(minimum=4, best=16, maximum=16),
    }
    second = {
        "batch": AxisRange(minimum=1, best=1, maximum=1),
        "length": AxisRange(minimum=4, best=64, maximum=128),
    }
    order = write_order(tmp_path, plan=PlanOptions(profiles=(Profile(axes=first), Profile(axes=second))))
    assert [(case.profile, case.name, *case.axes.values()) for case in cases_of(order)] == [
        (0, "best", 8, 16),  # the largest, too
        (0, "smallest", 1, 4),
        (1, "best", 1, 64),
        (1, "smallest", 1, 4),
        (1, "largest", 1, 128),
    ]


def test_without_a_profile_the_batch_is_1_and_the_largest(tmp_path: Path) -> None:
    order = write_order(tmp_path, plan=PlanOptions())
    assert [dict(case.axes) for case in cases_of(order)] == [{"batch": 8}, {"batch": 1}]
    order = write_order(tmp_path, plan=PlanOptions(), max_batch_size=0)
    assert [dict(case.axes) for case in cases_of(order)] == [{}]
