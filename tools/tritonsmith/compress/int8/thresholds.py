"""Where a tensor's range is cut before 256 steps are spread over it: four ways, from one histogram."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tritonsmith.compress.int8.calibrate import BINS, Histogram
from tritonsmith.errors import UsageError

Range = tuple[float, float]

STEPS = 255  # of 8 bits
LEVELS = 128  # magnitudes of a symmetric INT8
ENTROPY_STRIDE = 8  # bins between two thresholds that are tried
SMOOTHING = 1e-4  # of a value, put where only what was cut off lies: its divergence would be infinite
MSE_TRIALS = 100
MSE_SMALLEST = 0.1  # share of the full range

CALIBRATORS = ("minmax", "entropy", "percentile", "mse")


def calibrator_of(name: str, *, percentile: float = 99.99) -> Callable[[Histogram], Range]:
    """The function that chooses a range, lowest and highest, from a histogram.

    Raises:
        UsageError: no such calibrator, or a percentile outside of (50, 100].
    """
    if not 50.0 < percentile <= 100.0:
        raise UsageError(
            f"{percentile:g} is no percentile to calibrate with", expected="above 50, at most 100"
        )
    known: dict[str, Callable[[Histogram], Range]] = {
        "minmax": minmax_range,
        "entropy": entropy_range,
        "percentile": partial(percentile_range, percentile=percentile),
        "mse": mse_range,
    }
    if name not in known:
        raise UsageError(f"no calibrator is named {name!r}", expected=", ".join(CALIBRATORS))
    return known[name]


def minmax_range(histogram: Histogram) -> Range:
    """All that was seen."""
    return histogram.lowest, histogram.highest


def percentile_range(histogram: Histogram, *, percentile: float) -> Range:
    """The magnitude below which `percentile` percent of the values other than zero lie, on either side."""
    magnitudes = _magnitudes(histogram)
    total = magnitudes.sum()
    if total == 0:
        return minmax_range(histogram)
    reached = np.searchsorted(np.cumsum(magnitudes), percentile / 100 * total)
    return _cut(histogram, (min(reached, BINS - 1) + 1) * histogram.edge / BINS)


def entropy_range(histogram: Histogram) -> Range:
    """The threshold whose 128 magnitudes lose the least information, by Kullback-Leibler divergence.

    After Migacz, "8-bit Inference with TensorRT", GTC 2017.
    """
    magnitudes = _magnitudes(histogram).astype(np.float64)
    if np.count_nonzero(magnitudes) < 2:
        return minmax_range(histogram)
    last = int(np.flatnonzero(magnitudes)[-1]) + 1
    trials = [*range(LEVELS, last, ENTROPY_STRIDE), last]
    divergences = [_divergence(magnitudes, kept) for kept in trials]
    return _cut(histogram, trials[int(np.argmin(divergences))] * histogram.edge / BINS)


def mse_range(histogram: Histogram) -> Range:
    """The range whose 256 steps give the smallest mean squared error: one end searched, then the other."""
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    shares = np.linspace(MSE_SMALLEST, 1.0, MSE_TRIALS)
    used = histogram.counts > 0
    centres, counts = histogram.centres()[used], histogram.counts[used]
    if not counts.size:
        return minmax_range(histogram)
    for _ in range(2):
        high = min((_squared_error(centres, counts, low, high * s), high * s) for s in shares)[1]
        low = min((_squared_error(centres, counts, low * s, high), low * s) for s in shares)[1]
    return low, high


def _magnitudes(histogram: Histogram) -> NDArray[np.int64]:
    return histogram.counts[BINS:] + histogram.counts[BINS - 1 :: -1]


def _cut(histogram: Histogram, threshold: float) -> Range:
    return max(histogram.lowest, -threshold), min(histogram.highest, threshold)


def _divergence(magnitudes: NDArray[np.float64], kept: int) -> float:
    """KL divergence of the first `kept` bins, what lies beyond put into the last, from 128 levels of them."""
    inside = magnitudes[:kept]
    reference = inside.copy()
    reference[-1] += magnitudes[kept:].sum()
    used = reference > 0
    level = np.minimum(np.arange(kept) * LEVELS // kept, LEVELS - 1)
    sums = np.bincount(level, inside, minlength=LEVELS)
    widths = np.bincount(level, used, minlength=LEVELS)
    coarse = np.where(used, sums[level] / np.maximum(widths[level], 1), 0.0)
    if not coarse.any():
        return float("inf")
    coarse = np.maximum(coarse, SMOOTHING)
    p, q = reference[used] / reference.sum(), coarse[used] / coarse[used].sum()
    return float((p * np.log(p / q)).sum())


def _squared_error(centres: NDArray[np.float64], counts: NDArray[np.int64], low: float, high: float) -> float:
    """Sum over the bins of (value - dequantized value) squared, with a zero point as ONNX defines it."""
    scale = (high - low) / STEPS
    if scale <= 0:
        return float((centres**2 * counts).sum())
    zero = np.rint(-low / scale)
    quantized = np.clip(np.rint(centres / scale) + zero, 0, STEPS)
    return float((((quantized - zero) * scale - centres) ** 2 * counts).sum())
