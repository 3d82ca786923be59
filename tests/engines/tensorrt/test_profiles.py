"""Optimization profiles: made, checked, and found in what a server was sent."""

from __future__ import annotations

from typing import Any

import pytest

from tritonsmith.artifact import TensorSpec
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.engines.tensorrt.profiles import (
    batch_modes,
    check_profiles,
    default_profile,
    executions_from_statistics,
    filled_profiles,
    free_axes,
    profiles_from_traffic,
    shapes_from_profile,
)
from tritonsmith.errors import PlanError

IMAGE = (TensorSpec(name="image", dtype="float32", shape=("batch", 3, 224, 224)),)
TOKENS = tuple(
    TensorSpec(name=name, dtype="int64", shape=("batch", "sequence"))
    for name in ("input_ids", "attention_mask")
)
FIXED = (TensorSpec(name="x", dtype="float32", shape=(4, 3)),)


def lengths(minimum: int, best: int, maximum: int) -> AxisRange:
    return AxisRange(minimum=minimum, best=best, maximum=maximum)


def statistics(*executions: tuple[int, int], name: str = "resnet") -> dict[str, Any]:
    """As Triton answers GET /v2/models/<name>/stats: batch size and count of executions."""
    batches = [
        {
            "batch_size": size,
            "compute_input": {"count": count, "ns": count * 1000},
            "compute_infer": {"count": count, "ns": count * 50_000},
            "compute_output": {"count": count, "ns": count * 1000},
        }
        for size, count in executions
    ]
    return {"model_stats": [{"name": name, "version": "1", "inference_count": 1, "batch_stats": batches}]}


def test_the_default_profile_is_tuned_for_the_largest_batch() -> None:
    assert default_profile(IMAGE, 32) == Profile(axes={"batch": lengths(1, 32, 32)})


def test_shapes_follow_a_profile() -> None:
    profile = Profile(axes={"batch": lengths(1, 8, 16), "sequence": lengths(2, 64, 256)})
    assert shapes_from_profile(profile, TOKENS[0]) == ((1, 2), (8, 64), (16, 256))
    assert free_axes(TOKENS) == ("batch", "sequence")


def test_a_free_axis_without_a_range_is_named_with_its_inputs() -> None:
    with pytest.raises(PlanError, match="no range for the free axis 'sequence'") as caught:
        default_profile(TOKENS, 8)
    assert "input_ids, attention_mask" in str(caught.value.fix)


def test_profiles_of_a_recipe_get_the_batch_axis() -> None:
    options = PlanOptions(profiles=(Profile(axes={"sequence": lengths(1, 32, 128)}),))
    (profile,) = filled_profiles(options, TOKENS, 8).profiles
    assert profile.axes == {"sequence": lengths(1, 32, 128), "batch": lengths(1, 8, 8)}


def test_a_profile_for_an_axis_that_the_model_lacks_is_refused() -> None:
    options = PlanOptions(profiles=(Profile(axes={"length": lengths(1, 32, 128)}),))
    with pytest.raises(PlanError, match="a range for 'length'") as caught:
        filled_profiles(options, TOKENS, 8)
    assert "batch, sequence" in str(caught.value.expected)


def test_a_model_without_free_axes_needs_no_profile() -> None:
    assert filled_profiles(PlanOptions(), FIXED, 0).profiles == ()
    with pytest.raises(PlanError, match="free axes but no optimization profile"):
        check_profiles((), IMAGE, 8)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (lengths(4, 2, 8), "impossible range for the axis 'batch'"),
        (lengths(1, 9, 8), "impossible range for the axis 'batch'"),
        (lengths(0, 1, 8), "impossible range for the axis 'batch'"),
        (lengths(2, 4, 8), "does not take a batch of 1"),
        (lengths(1, 4, 7), "does not take the largest batch"),
    ],
)
def test_ranges_that_cannot_serve_are_refused(batch: AxisRange, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        check_profiles((Profile(axes={"batch": batch}),), IMAGE, 8)
    check_profiles((Profile(axes={"batch": lengths(1, 4, 9)}),), IMAGE, 8)


def test_a_profile_is_tuned_for_the_size_that_carries_the_most_samples() -> None:
    # 900 single requests are 900 samples; 200 batches of 8 are 1,600
    (profile, second) = profiles_from_traffic(statistics((1, 900), (2, 10), (8, 200)), IMAGE, 16)
    assert profile.axes["batch"] == lengths(1, 8, 16)
    assert second.axes["batch"] == lengths(1, 1, 16)


def test_traffic_with_one_mode_gives_one_profile() -> None:
    (profile,) = profiles_from_traffic(statistics((1, 5), (3, 40), (4, 90), (5, 60), (6, 20)), IMAGE, 8)
    assert profile.axes["batch"] == lengths(1, 4, 8)


def test_batches_beyond_the_largest_count_as_the_largest() -> None:
    (profile,) = profiles_from_traffic(statistics((64, 10)), IMAGE, 8)
    assert profile.axes["batch"] == lengths(1, 8, 8)


@pytest.mark.parametrize(
    ("samples", "modes"),
    [
        ({1: 100}, (1,)),
        ({1: 100, 32: 100}, (32, 1)),
        ({1: 100, 2: 60, 4: 100}, (4,)),  # no valley: 60 is more than half of 100
        ({1: 100, 2: 40, 4: 100}, (4, 1)),
        ({1: 10, 16: 990}, (16,)),  # 1 % is no mode
        ({5: 10, 6: 40, 7: 30}, (6,)),
        ({2**n: 10 for n in range(8)}, (1,)),  # flat: no bin stands out
    ],
)
def test_modes_are_peaks_with_a_valley_between(samples: dict[int, int], modes: tuple[int, ...]) -> None:
    assert batch_modes(samples) == modes


def test_statistics_of_gRPC_and_of_several_versions_are_read() -> None:  # noqa: N802
    first, second = statistics((1, 3)), statistics((1, 4), (2, 1))
    both = {"model_stats": first["model_stats"] + second["model_stats"]}
    both["model_stats"][0]["batch_stats"][0] = {"batch_size": "1", "compute_infer": {"count": "3"}}
    assert executions_from_statistics(both, "resnet") == {1: 7, 2: 1}


@pytest.mark.parametrize(
    ("answer", "model", "what"),
    [
        ({"error": "unknown model"}, None, "not Triton's statistics"),
        ([], None, "not Triton's statistics"),
        (statistics((1, 1)), "bert", "no statistics of the model 'bert'"),
        ({"model_stats": []}, None, "more than one model, or of none"),
        (statistics(), None, "hold no execution"),
        (statistics((4, 0)), None, "hold no execution"),
    ],
)
def test_statistics_without_traffic_are_refused(answer: Any, model: str | None, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        profiles_from_traffic(answer, IMAGE, 8, model=model)
