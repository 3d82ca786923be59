"""Each calibrator against what numpy says of the same values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tritonsmith.compress.int8.calibrate import BINS, Histogram
from tritonsmith.compress.int8.thresholds import calibrator_of
from tritonsmith.errors import UsageError

Array = NDArray[Any]


def histogram(values: Array) -> Histogram:
    edge = float(np.abs(values).max())
    counts, _ = np.histogram(values[values != 0], bins=2 * BINS, range=(-edge, edge))
    return Histogram(lowest=float(values.min()), highest=float(values.max()), edge=edge, counts=counts)


def squared_error(values: Array, low: float, high: float) -> float:
    """Of ONNX's QuantizeLinear to uint8 and back, on the values themselves."""
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    rounded = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float((((rounded - zero) * scale - values) ** 2).mean())


@pytest.fixture
def outliers() -> Array:
    """A bell of width 1 with one value in ten thousand at about 40."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[:10] = rng.uniform(38, 40, 10)
    return values


def test_minmax_keeps_all(outliers: Array) -> None:
    low, high = calibrator_of("minmax")(histogram(outliers))
    assert (low, high) == (outliers.min(), outliers.max())


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_that_of_the_magnitudes(outliers: Array, percentile: float) -> None:
    _, high = calibrator_of("percentile", percentile=percentile)(histogram(outliers))
    width = np.abs(outliers).max() / BINS
    assert high == pytest.approx(np.percentile(np.abs(outliers), percentile), abs=2 * width)


def test_zeros_of_a_relu_do_not_count_as_values(outliers: Array) -> None:
    sparse = np.concatenate([np.abs(outliers), np.zeros(900_000)])
    dense = np.abs(outliers)
    choose = calibrator_of("percentile", percentile=99.0)
    assert choose(histogram(sparse)) == (0.0, choose(histogram(dense))[1])


def test_mse_is_near_the_best_range_that_a_search_on_the_values_finds(outliers: Array) -> None:
    low, high = calibrator_of("mse")(histogram(outliers))
    best = min(squared_error(outliers, -a, a) for a in np.linspace(1, 40, 400))
    assert squared_error(outliers, low, high) <= 1.05 * best
    assert squared_error(outliers, low, high) < squared_error(outliers, outliers.min(), outliers.max())


def test_mse_searches_each_end_by_itself() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([-rng.exponential(0.2, 20_000), rng.normal(0, 1, 20_000), rng.uniform(20, 30, 3)])
    low, high = calibrator_of("mse")(histogram(values))
    grid = [(a, b) for a in np.linspace(-5, -1, 21) for b in np.linspace(2, 30, 57)]
    best = min(squared_error(values, a, b) for a, b in grid)
    alike = min(squared_error(values, -b, b) for _, b in grid)
    assert squared_error(values, low, high) <= 1.02 * best
    assert squared_error(values, low, high) < 0.9 * alike


def test_entropy_cuts_a_far_outlier_and_keeps_even_values(outliers: Array) -> None:
    low, high = calibrator_of("entropy")(histogram(outliers))
    assert 3 < high < 30
    assert -high <= low < -3
    even = np.random.default_rng(2).uniform(-1, 1, 200_000)
    assert calibrator_of("entropy")(histogram(even))[1] > 0.97


@pytest.mark.parametrize("name", ["minmax", "entropy", "percentile", "mse"])
def test_a_tensor_that_is_always_zero_has_a_range(name: str) -> None:
    zeros = Histogram(lowest=0.0, highest=0.0, edge=1e-30, counts=np.zeros(2 * BINS, np.int64))
    assert calibrator_of(name)(zeros) == (0.0, 0.0)


def test_unknown_calibrators_and_percentiles_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="no calibrator is named 'kl'"):
        calibrator_of("kl")
    with pytest.raises(UsageError, match="no percentile"):
        calibrator_of("percentile", percentile=101.0)
