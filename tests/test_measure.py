"""The speed ratio of two sessions of known pace."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tritonsmith.measure import FEWEST_ROUNDS, ROUNDS, SpeedRatio, compare_speed, compare_speeds


class Sleeper:
    """A session that takes as long as it is told; the clock is real."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        time.sleep(self._seconds)
        return dict(inputs)


def test_the_ratio_is_how_many_times_as_fast() -> None:
    found = compare_speed(Sleeper(0.004), Sleeper(0.002), {"x": np.zeros(1)}, batch_size=1)
    assert found.ratio == pytest.approx(2.0, rel=0.2)
    assert found.low <= found.ratio <= found.high
    assert found.baseline_ms == pytest.approx(4, rel=0.5)
    assert not found.slower
    assert FEWEST_ROUNDS <= found.rounds <= ROUNDS
    assert found.rounds % 2 == 1


@pytest.mark.parametrize(
    ("ratio", "low", "high", "slower"),
    [(0.9, 0.7, 1.2, True), (0.995, 0.98, 0.999, True), (0.99, 0.9, 1.1, False), (1.5, 1.4, 1.6, False)],
)
def test_slower_means_beyond_doubt_or_by_more_than_a_hair(
    ratio: float, low: float, high: float, slower: bool
) -> None:
    speed = SpeedRatio(
        ratio=ratio, low=low, high=high, rounds=9, baseline_ms=1.0, candidate_ms=1.0, batch_size=1
    )
    assert speed.slower is slower


def test_several_are_timed_beside_one() -> None:
    candidates = [Sleeper(0.004), Sleeper(0.002), Sleeper(0.001)]
    found = compare_speeds(Sleeper(0.004), candidates, {"x": np.zeros(1)}, batch_size=1)
    assert [round(speed.ratio, 1) for speed in found] == pytest.approx([1, 2, 4], rel=0.25)
    assert len({speed.baseline_ms for speed in found}) == 1
