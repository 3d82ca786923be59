"""Rounding weights in blocks: where each block's steps lie, and the codes on them.

A weight's block is a run of consecutive elements along one axis. A grid says how far apart the values of
each block lie; `codes_of` rounds to it, `values_of` goes back. train/fake_rounding.py does the same in
PyTorch, bit for bit, so that training sees what will be stored.

Two kinds of grid: one float step for each block; or, for integer arithmetic, an INT8 multiplier for each
block times a float scale for each column (progressive group quantization, QServe, arXiv 2405.04532), so that
multiplier times code is itself an INT8 number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Clipping the largest elements of a block can lower the squared error; these shares of the largest are tried.
CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)
INT4, INT8 = (-8, 7), (-127, 127)  # the codes; products in INT8 are exact without -128


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where the values of a weight `[K, N]` or, with `axis` 1, `[N, K]` may lie.

    A value is `code * step`, or `code * multiplier * scale` where there are multipliers; `steps` is
    float32 and `multipliers` int8, of the weight's shape with K replaced by the number of blocks;
    `scales` is float32 `[N]`. Codes lie from `lowest` to `highest`. The last block may be shorter than
    `block`.
    """

    axis: int
    block: int
    lowest: int
    highest: int
    steps: Array
    multipliers: Array | None = None
    scales: Array | None = None

    @property
    def bits(self) -> int:
        """Of a stored code."""
        return 4 if self.highest <= INT4[1] else 8


def fit_grid(weight: Array, *, codes: tuple[int, int], block: int, axis: int = 0) -> Grid:
    """A float step for each block of a float32 weight: the clip in `CLIPS` with the least squared error."""
    lowest, highest = codes
    blocks = split_blocks(weight, block, axis)
    largest = np.abs(blocks).max(axis=axis + 1)
    largest = np.where(largest > 0, largest, np.float32(1.0))
    candidates = (largest * np.float32(clip / highest) for clip in CLIPS)
    steps = _best_steps(blocks, candidates, codes, axis)
    return Grid(axis=axis, block=block, lowest=lowest, highest=highest, steps=steps)


def fit_progressive(weight: Array, *, block: int, axis: int = 0, limit: int = 127) -> Grid:
    """INT8 multipliers for INT4 blocks of a float32 weight, and a float scale for each column.

    Code times multiplier stays within `limit`; of the multipliers that allow that, each block gets the one
    with the least squared error. A negative one gives the code -8, which has no counterpart, to the side
    that needs it: on MiniLM the squared error is about a tenth lower for it.
    """
    lowest, highest = INT4
    most = limit // -lowest
    blocks = split_blocks(weight, block, axis)
    largest = np.abs(weight).max(axis=axis)
    scales = np.where(largest > 0, largest / np.float32(most * highest), np.float32(1.0)).astype(np.float32)
    across = np.expand_dims(scales, axis)
    shape = tuple(np.delete(blocks.shape, axis + 1))
    numbers = [sign * size for size in range(most, 0, -1) for sign in (1, -1)]
    candidates = (np.broadcast_to(across * np.float32(number), shape) for number in numbers)
    steps = _best_steps(blocks, candidates, INT4, axis)
    return Grid(
        axis=axis,
        block=block,
        lowest=lowest,
        highest=highest,
        steps=steps,
        multipliers=np.rint(steps / across).astype(np.int8),
        scales=scales,
    )


def codes_of(weight: Array, grid: Grid) -> Array:
    """The nearest codes, int8, of the weight's shape; halves go to the even neighbour."""
    blocks = split_blocks(weight, grid.block, grid.axis)
    codes = np.clip(np.rint(blocks / _spread(grid.steps, grid.axis)), grid.lowest, grid.highest)
    return join_blocks(codes.astype(np.int8), weight.shape[grid.axis], grid.axis)


def values_of(codes: Array, grid: Grid) -> Array:
    """What codes stand for, float32, of their shape."""
    blocks = split_blocks(codes, grid.block, grid.axis).astype(np.float32)
    if grid.multipliers is None or grid.scales is None:
        return join_blocks(blocks * _spread(grid.steps, grid.axis), codes.shape[grid.axis], grid.axis)
    whole = blocks * _spread(grid.multipliers.astype(np.float32), grid.axis)
    joined = join_blocks(whole, codes.shape[grid.axis], grid.axis)
    values: Array = joined * np.expand_dims(grid.scales, grid.axis)
    return values


def split_blocks(weight: Array, block: int, axis: int) -> Array:
    """`[K, N]` as `[K / block, block, N]`, `[N, K]` as `[N, K / block, block]`; zeros fill the last block."""
    missing = -weight.shape[axis] % block
    if missing:
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, missing)
        weight = np.pad(weight, pad)
    shape = list(weight.shape)
    shape[axis : axis + 1] = [shape[axis] // block, block]
    return weight.reshape(shape)


def join_blocks(blocks: Array, length: int, axis: int) -> Array:
    """The inverse of `split_blocks`, for a weight of `length` along `axis`."""
    shape = list(blocks.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    joined = blocks.reshape(shape)
    return joined[:length] if axis == 0 else joined[:, :length]


def _spread(per_block: Array, axis: int) -> Array:
    return np.expand_dims(per_block, axis + 1)


def _best_steps(blocks: Array, candidates: Iterable[Array], codes: tuple[int, int], axis: int) -> Array:
    """For each block the step with the least squared error; the first of equals."""
    best: Array | None = None
    least: Array | None = None
    for steps in candidates:
        spread = _spread(steps, axis)
        rounded = np.clip(np.rint(blocks / spread), *codes) * spread
        error = np.square(rounded - blocks).sum(axis=axis + 1)
        if best is None or least is None:
            best, least = np.array(steps, dtype=np.float32), error
            continue
        better = error < least
        best[better] = steps[better]
        least = np.minimum(error, least)
    assert best is not None  # noqa: S101 - both callers give candidates
    return best
