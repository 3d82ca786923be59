"""Two arrays held against each other.

Floats may differ by `tolerance * (scale + |expected value|)`, where the scale is the largest finite
|expected value| below SENTINEL. NaN equals NaN, infinity equals infinity of its sign. Everything else must
be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.errors import ValidationError
from tritonsmith.ingest.parity import SENTINEL, TINY

Array = NDArray[Any]
TEXT_LENGTH = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`worst` is the index of the value that is furthest off, None where all are equal."""

    max_abs_error: float
    max_rel_error: float
    passed: bool
    worst: tuple[int, ...] | None


def compare(output: str, served: Array, expected: Array, tolerance: float | None) -> Comparison:
    """Compare two arrays of one shape; `tolerance` None measures and lets every finite difference pass.

    Raises:
        ValidationError: the shapes differ, or one holds text and the other numbers.
    """
    if served.shape != expected.shape or (served.dtype == object) != (expected.dtype == object):
        raise ValidationError(
            f"output {output!r} cannot be compared",
            found=f"{served.dtype} of shape {list(served.shape)} from the server",
            expected=f"{expected.dtype} of shape {list(expected.shape)}",
        )
    if _is_float(served) or _is_float(expected):
        return _compare_floats(served.astype(np.float64), expected.astype(np.float64), tolerance)
    wrong = np.asarray(served != expected)
    error, scale = wrong.astype(np.float64), 1.0
    if served.dtype.kind in "iu" and expected.dtype.kind in "iu":
        error = np.abs(served.astype(np.float64) - expected.astype(np.float64))
        scale = max(float(np.abs(expected.astype(np.float64)).max(initial=0.0)), 1.0)
    largest = float(error.max(initial=0.0))
    return Comparison(
        max_abs_error=largest,
        max_rel_error=largest / scale,
        passed=tolerance is None or not wrong.any(),
        worst=_index(np.maximum(error, wrong), wrong.shape) if wrong.any() else None,
    )


def show(value: object) -> str:
    """A value in few characters."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    text = f"{value:.7g}" if isinstance(value, (float, np.floating)) else str(value)
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"


def _compare_floats(served: Array, expected: Array, tolerance: float | None) -> Comparison:
    both = np.isfinite(served) & np.isfinite(expected)
    same = both | (np.isnan(served) & np.isnan(expected)) | (served == expected)
    error = np.abs(np.where(both, served, 0.0) - np.where(both, expected, 0.0))
    size = np.abs(np.where(both, expected, 0.0))
    scale = float(size[size < SENTINEL].max(initial=0.0))
    relative = error / np.maximum(scale + size, TINY)
    if not same.all():
        worst = _index(~same, same.shape)
        return Comparison(max_abs_error=float("inf"), max_rel_error=float("inf"), passed=False, worst=worst)
    return Comparison(
        max_abs_error=float(error.max(initial=0.0)),
        max_rel_error=float((error / np.maximum(np.maximum(scale, size), TINY)).max(initial=0.0)),
        passed=tolerance is None or bool((relative <= tolerance).all()),
        worst=_index(relative, relative.shape) if error.any() else None,
    )


def _index(values: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.unravel_index(int(values.argmax()), shape))


def _is_float(array: Array) -> bool:
    return array.dtype.kind in "fV"  # ml_dtypes.bfloat16 is of kind V
