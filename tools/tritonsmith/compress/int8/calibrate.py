"""One pass over the calibration data: the range and a histogram of each tensor, for every calibrator."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.compress.int8.taps import run_tapped
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.samples import Samples

BINS = 2048  # on each side of zero
# More values of one tensor in one sample are read with a stride; its lowest and highest are always exact.
COUNTED_VALUES = 1 << 16
SMALLEST = 1e-30  # the width of an empty histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often a tensor takes which values; zeros, which any scale keeps exactly, are not counted."""

    lowest: float
    highest: float
    edge: float  # the bins lie evenly between -edge and edge
    counts: NDArray[np.int64]  # [2 * BINS]

    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin, `[2 * BINS]`."""
        width = self.edge / BINS
        middles: NDArray[Any] = (np.arange(2 * BINS) - BINS + 0.5) * width
        return middles


def collect_histograms(
    prepared: Path,
    names: Iterable[str],
    samples: Samples,
    *,
    batched: bool,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Histogram]:
    """The histogram of each tensor in `names` over all samples, seen in the graph at `prepared`.

    Bins double in width whenever a value lies outside, which merges them in pairs and loses nothing.

    Raises:
        CompressionError: the graph cannot be run.
        SamplesError: a tensor becomes NaN or infinite.
    """
    wanted = sorted(names)
    found: dict[str, Histogram] = {}
    done = 0
    for count, tensors in run_tapped(prepared, wanted, samples, batched=batched):
        for name in wanted:
            found[name] = _with_values(name, found.get(name), tensors[name], count, samples)
        before, done = done, done + count
        if done * 4 // samples.count > before * 4 // samples.count:
            say(f"calibrated on {done} of {samples.count} samples")
    if not found and wanted:
        raise CompressionError(f"{prepared.name} was calibrated on no sample")
    return found


def ranges_of(
    histograms: Mapping[str, Histogram], choose: Callable[[Histogram], tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """The range that `choose` gives each tensor."""
    return {name: choose(histogram) for name, histogram in histograms.items()}


def _with_values(
    name: str, histogram: Histogram | None, array: NDArray[Any], rows: int, samples: Samples
) -> Histogram:
    values = array.ravel()
    if values.size == 0:
        return histogram or Histogram(lowest=0.0, highest=0.0, edge=SMALLEST, counts=_empty())
    lowest, highest = float(values.min()), float(values.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise SamplesError(
            f"{samples.path} cannot calibrate tensor {name!r}",
            found=f"values from {lowest:g} to {highest:g}",
            expected="samples on which the model gives finite numbers",
        )
    largest = max(-lowest, highest)
    if histogram is None or not histogram.counts.any():
        edge, counts = max(largest, SMALLEST), _empty()
    else:
        edge, counts = _widened(histogram, largest)
        lowest, highest = min(lowest, histogram.lowest), max(highest, histogram.highest)
    counts = counts + _count(_strided(values, rows), edge)
    return Histogram(lowest=lowest, highest=highest, edge=edge, counts=counts)


def _empty() -> NDArray[np.int64]:
    return np.zeros(2 * BINS, np.int64)


def _widened(histogram: Histogram, largest: float) -> tuple[float, NDArray[np.int64]]:
    edge, counts = histogram.edge, histogram.counts
    while largest > edge:
        edge *= 2
        inner = counts.reshape(-1, 2).sum(axis=1)
        counts = _empty()
        counts[BINS // 2 : BINS // 2 + BINS] = inner
    return edge, counts


def _strided(values: NDArray[Any], rows: int) -> NDArray[Any]:
    stride = -(-values.size // (COUNTED_VALUES * rows))
    return values[:: stride | 1]  # odd, so that it falls into step with no even number of channels


def _count(values: NDArray[Any], edge: float) -> NDArray[np.int64]:
    values = values[values != 0]
    bins = np.floor(values * np.float32(BINS / edge)).astype(np.int32) + BINS
    return np.bincount(np.clip(bins, 0, 2 * BINS - 1), minlength=2 * BINS)


def save_histograms(histograms: Mapping[str, Histogram], path: Path) -> None:
    """Keep histograms in an .npz, whole or not at all."""
    names = sorted(histograms)
    ordered = [histograms[name] for name in names]
    bounds = np.array([[entry.lowest, entry.highest, entry.edge] for entry in ordered])
    counts = np.array([entry.counts for entry in ordered])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        np.savez_compressed(stream, names=np.array(names), bounds=bounds, counts=counts)
    Path(stream.name).replace(path)


def load_histograms(path: Path) -> dict[str, Histogram]:
    """What `save_histograms` kept."""
    with np.load(path) as arrays:
        rows = zip(arrays["names"].tolist(), arrays["bounds"].tolist(), arrays["counts"], strict=True)
        return {
            name: Histogram(lowest=lowest, highest=highest, edge=edge, counts=counts)
            for name, (lowest, highest, edge), counts in rows
        }
