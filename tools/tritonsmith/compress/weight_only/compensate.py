"""Error compensation: what rounding one row of a weight does is made up for by the rows that follow.

GPTQ (Frantar et al., arXiv 2210.17323), with the rows in their own order: for a product x @ w, the rounding
error of row k is spread over the later rows in the way that changes x @ w least, for the x of the calibration
data. It needs their second moments only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.compress.calibration import token_mask
from tritonsmith.compress.int8.taps import run_tapped
from tritonsmith.compress.weight_only.blocks import Grid
from tritonsmith.samples import Samples

Array = NDArray[Any]

DAMPING = 0.01  # of the mean of the diagonal, as in the paper
ROWS = 64  # compensated at once; the rows behind wait for the end of their turn


def second_moments(
    path: Path, names: Sequence[str], samples: Samples, *, batched: bool
) -> Mapping[str, Array]:
    """x^T x, float64 `[K, K]`, of each tensor `[..., K]` in `names`, over all samples; padding is left out.

    Raises:
        CompressionError: ONNX Runtime refuses the model.
    """
    moments: dict[str, Array] = {}
    mask = token_mask(samples)
    start = 0
    for count, tensors in run_tapped(path, names, samples, batched=batched):
        here = None if mask is None else mask[start : start + count]
        start += count
        for name, array in tensors.items():
            rows = array.reshape(-1, array.shape[-1])
            if here is not None and array.shape[:-1] == here.shape:
                rows = rows[here.ravel()]
            moment = (rows.T @ rows).astype(np.float64)
            moments[name] = moments[name] + moment if name in moments else moment
    return moments


def compensated(weight: Array, moment: Array, grid: Grid) -> Array:
    """A weight `[K, N]` whose nearest codes on `grid` (axis 0) are those that GPTQ chooses; float32."""
    length = len(weight)
    damped = moment + np.eye(length) * max(DAMPING * float(np.diag(moment).mean()), np.finfo(np.float64).tiny)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    steps = np.repeat(grid.steps, grid.block, axis=0)[:length]
    left = weight.astype(np.float32)
    chosen = np.empty_like(left)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        errors = np.empty((stop - start, weight.shape[1]), dtype=np.float32)
        for row in range(start, stop):
            codes = np.clip(np.rint(left[row] / steps[row]), grid.lowest, grid.highest)
            chosen[row] = codes * steps[row]
            errors[row - start] = (left[row] - chosen[row]) / factor[row, row]
            left[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], errors[row - start])
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return chosen
