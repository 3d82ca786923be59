"""Resize: nearest and linear, axis by axis, in every coordinate mode but the cropping one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tritonsmith.train.node import Node, Operation

MODES = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners", "half_pixel_symmetric")


def build_resize(node: Node) -> Operation:
    mode, coordinates = node.text("mode", "nearest"), node.text("coordinate_transformation_mode", MODES[1])
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    if mode not in ("nearest", "linear") or coordinates not in MODES or policy != "stretch":
        raise node.refusal(f"mode {mode!r}, coordinates {coordinates!r}, policy {policy!r}")
    if node.integer("antialias", 0):
        raise node.refusal("antialias = 1")
    rounding = node.text("nearest_mode", "round_prefer_floor")
    given = node.integers("axes")

    def resize(
        x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        dims = list(range(x.ndim)) if given is None else [axis % x.ndim for axis in given]
        wanted: list[int] | None = sizes.tolist() if sizes is not None and sizes.numel() else None
        factors: list[float] = [] if scales is None else scales.tolist()
        for index, dim in enumerate(dims):
            size = x.shape[dim]
            target = wanted[index] if wanted is not None else int(size * factors[index])
            scale = factors[index] if factors else target / size
            if target == size and scale == 1.0:
                continue
            places = _places(size, target, scale, coordinates)
            x = _nearest(x, dim, places, rounding) if mode == "nearest" else _linear(x, dim, places)
        return x

    return resize


def _places(size: int, target: int, scale: float, coordinates: str) -> NDArray[np.float32]:
    """Where each element of the result lies on the axis of the input `[target]`."""
    index = np.arange(target, dtype=np.float32)
    offset, step = 0.0, 1 / scale
    if coordinates == "align_corners":
        step = (size - 1) / (target - 1) if target > 1 else 0.0
    elif coordinates == "pytorch_half_pixel" and target == 1:
        step = 0.0
    elif coordinates != "asymmetric":
        offset = 0.5 * step - 0.5
        if coordinates == "half_pixel_symmetric":
            offset += size / 2 * (1 - target / (scale * size))
    places: NDArray[np.float32] = (index * np.float64(step) + offset).astype(np.float32)
    return places


def _nearest(x: Tensor, dim: int, places: NDArray[np.float32], rounding: str) -> Tensor:
    if rounding == "floor":
        chosen = np.floor(places)
    elif rounding == "ceil":
        chosen = np.ceil(places)
    elif rounding == "round_prefer_ceil":
        chosen = np.floor(places + np.float32(0.5))
    else:
        chosen = np.ceil(places - np.float32(0.5))
    rows = np.clip(chosen, 0, x.shape[dim] - 1).astype(np.int64)
    return x.index_select(dim, torch.from_numpy(rows).to(x.device))


def _linear(x: Tensor, dim: int, places: NDArray[np.float32]) -> Tensor:
    inside = np.clip(places, 0, x.shape[dim] - 1)
    low = np.floor(inside).astype(np.int64)
    high = np.minimum(low + 1, x.shape[dim] - 1)
    view = [1] * x.ndim
    view[dim] = len(places)
    share = torch.from_numpy(inside - low).to(x.dtype).to(x.device).reshape(view)
    before, after = (x.index_select(dim, torch.from_numpy(rows).to(x.device)) for rows in (low, high))
    return before + (after - before) * share
