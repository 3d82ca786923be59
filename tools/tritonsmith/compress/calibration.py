"""Calibration data: what is refused, and how it is fed in chunks.

tritonsmith never makes calibration data up. What it can tell honestly about data that it is given: rows
that are also evaluation rows, samples that are all the same, and numbers unlike those of the evaluation
data, which are taken to be what the model is meant for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.errors import SamplesError
from tritonsmith.samples import Samples

MASK = "attention_mask"
FEW_SAMPLES = 16
# Bounds memory: the activations of one chunk live at once. ResNet-50 peaks at 0.6 GB so, at 2.1 with eight.
CHUNK_BYTES = 262_144
CHUNK_SAMPLES = 32
RANGE_RATIO = 4.0  # how far the spread of calibration and evaluation data may differ
UNLIKE_MEANS = 1.0  # mean distance of feature means, in standard deviations (Cohen's d, "large" is 0.8)
SMOOTH, NOISE = 0.5, 0.1  # correlation of neighbours along an axis
LONG_AXIS = 4  # an axis this long can have neighbours that mean something


def check_calibration(
    calibration: Samples,
    evaluation: Samples | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Refuse calibration data that cannot lead to an honest result; say what is merely doubtful.

    Raises:
        SamplesError: samples that are all the same, rows that are in the evaluation data too, or numbers
            of another range, other features or of noise, compared with the evaluation data.
    """
    if calibration.count > 1 and all(_is_constant(array) for array in calibration.arrays.values()):
        raise SamplesError(
            f"{calibration.path} cannot calibrate anything: its {calibration.count} samples are all the same",
            expected="samples like those that the model will see",
        )
    if calibration.count < FEW_SAMPLES:
        say(
            f"{calibration.path} has only {calibration.count} samples to calibrate on; "
            f"ranges are more trustworthy from {FEW_SAMPLES} or more, some hundreds at best"
        )
    for name, array in calibration.arrays.items():
        if constant := _constant_channels(array):
            say(f"{calibration.path}: channels {constant} of input {name!r} are constant in all samples")
    if evaluation is None:
        return
    refuse_shared(
        str(calibration.path),
        row_hashes(calibration),
        f"the evaluation data {evaluation.path}",
        row_hashes(evaluation),
    )
    for name, array in calibration.arrays.items():
        if array.dtype.kind == "f":
            _refuse_unlike(calibration, evaluation, name)


def row_hashes(samples: Samples) -> list[bytes]:
    """A hash of each sample: its rows of all inputs, labels left out."""
    names = sorted(samples.arrays)
    hashes = []
    for index in range(samples.count):
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            row = samples.arrays[name][index : index + 1]  # an array, also where a sample is one string
            digest.update(repr(row.tolist()).encode() if row.dtype == object else row.tobytes())
        hashes.append(digest.digest())
    return hashes


def token_mask(samples: Samples) -> NDArray[Any] | None:
    """Where samples hold tokens and no padding, bool `[N, L]`; None without an input named attention_mask."""
    mask = samples.arrays.get(MASK)
    return mask != 0 if mask is not None and mask.ndim == 2 else None


def chunks(samples: Samples, *, batched: bool) -> Iterator[dict[str, NDArray[Any]]]:
    """Inputs for one run after another: a few rows, or one sample for a model without batch axis."""
    row_bytes = sum(array[:1].nbytes for array in samples.arrays.values())
    rows = int(np.clip(CHUNK_BYTES // max(1, row_bytes), 1, CHUNK_SAMPLES)) if batched else 1
    for start in range(0, samples.count, rows):
        stop = start + rows
        yield {name: array[start:stop] if batched else array[start] for name, array in samples.arrays.items()}


def refuse_shared(first: str, ours: Sequence[bytes], second: str, theirs: Sequence[bytes]) -> None:
    """Raise SamplesError where two sets of samples, given by their `row_hashes`, share some."""
    seen = set(theirs)
    shared = [index for index, row in enumerate(ours) if row in seen]
    if shared:
        raise SamplesError(
            f"{first} shares samples with {second}",
            found=f"{len(shared)} of {len(ours)}, first at row {shared[0]}",
            expected="samples that are kept apart: what a model is fitted to, chosen on and judged on",
            fix="split them anew; repeated samples belong to one side",
        )


def _refuse_unlike(calibration: Samples, evaluation: Samples, name: str) -> None:
    ours = calibration.arrays[name].astype(np.float64)
    theirs = evaluation.arrays[name].astype(np.float64)
    reason = _other_range(ours, theirs) or _noise(ours, theirs) or _other_features(ours, theirs)
    if reason is not None:
        raise SamplesError(
            f"{calibration.path}: input {name!r} does not look like the evaluation data {evaluation.path}",
            found=reason,
            expected="calibration data prepared exactly as the evaluation data is",
            fix="calibrate on part of the training data, with the same scaling and layout",
        )


def _other_range(ours: NDArray[Any], theirs: NDArray[Any]) -> str | None:
    low, high = (float(np.abs(array).max()) for array in (ours, theirs))
    if max(low, high) > RANGE_RATIO * min(low, high):
        return (
            f"values from {ours.min():.4g} to {ours.max():.4g} against {theirs.min():.4g} to "
            f"{theirs.max():.4g} in the evaluation data"
        )
    return None


def _noise(ours: NDArray[Any], theirs: NDArray[Any]) -> str | None:
    for axis in range(1, ours.ndim):
        if min(ours.shape[axis], theirs.shape[axis]) < LONG_AXIS:
            continue
        mine, other = _neighbour_correlation(ours, axis), _neighbour_correlation(theirs, axis)
        if mine < NOISE and other > SMOOTH:
            return (
                f"neighbours along axis {axis} correlate at {mine:.2f} against {other:.2f} in the "
                "evaluation data: this looks like random noise"
            )
    return None


def _other_features(ours: NDArray[Any], theirs: NDArray[Any]) -> str | None:
    if ours.shape[1:] != theirs.shape[1:] or min(len(ours), len(theirs)) < FEW_SAMPLES:
        return None
    spread = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 2)
    gap = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))
    moving = spread > 0
    if not moving.any():
        return None
    distance = float((gap[moving] / spread[moving]).mean())
    if distance > UNLIKE_MEANS:
        return f"the mean of a feature lies {distance:.1f} standard deviations away, on average"
    return None


def _neighbour_correlation(array: NDArray[Any], axis: int) -> float:
    left = np.take(array, range(array.shape[axis] - 1), axis=axis).ravel()
    right = np.take(array, range(1, array.shape[axis]), axis=axis).ravel()
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _is_constant(array: NDArray[Any]) -> bool:
    return bool((array == array[:1]).all())


def _constant_channels(array: NDArray[Any]) -> list[int]:
    """Channels of a float image `[N, C, H, W]` or `[N, H, W, C]` with one value throughout."""
    if array.dtype.kind != "f" or array.ndim != 4 or len(array) < 2:
        return []
    axis = 1 if array.shape[1] <= 4 else 3
    if not 1 < array.shape[axis] <= 4:
        return []
    flat = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return [int(index) for index in np.flatnonzero(flat.min(axis=1) == flat.max(axis=1))]
