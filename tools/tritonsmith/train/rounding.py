"""QuantizeLinear and DequantizeLinear, with straight-through gradients (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritonsmith.train.node import Node, Operation

RANGES: Mapping[torch.dtype, tuple[int, int]] = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.uint16: (0, 65535),
}


def _build_quantize(node: Node) -> Operation:
    """Integers are kept as floats, so that gradients pass; beyond the range there is none."""
    axis = node.integer("axis", 1)
    zero = node.constant(2)
    limits = RANGES.get(torch.uint8 if zero is None else zero.dtype)
    if limits is None or node.integer("block_size", 0) or node.integer("output_dtype", 0):
        raise node.refusal("blocks, or integers other than of 8 or 16 bits")
    low, high = limits

    def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        scale, zero_point = _along(x, axis, scale), _along(x, axis, zero_point)
        steps = x / scale
        rounded = steps + (torch.round(steps) - steps).detach()
        return torch.clamp(rounded if zero_point is None else rounded + zero_point, low, high)

    return quantize


def _build_dequantize(node: Node) -> Operation:
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)

    def dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        if block:
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
            if zero_point is not None:
                zero_point = zero_point.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
        else:
            scale, zero_point = _along(x, axis, scale), _along(x, axis, zero_point)
        steps = x.to(scale.dtype)
        return (steps if zero_point is None else steps - zero_point.to(scale.dtype)) * scale

    return dequantize


def _along(x: Tensor, axis: int, values: Any) -> Any:
    """Values per channel in a shape that meets their axis."""
    if values is None or values.numel() == 1:
        return values if values is None else values.reshape(())
    view = [1] * x.ndim
    view[axis] = -1
    return values.reshape(view)


ROUNDING: Mapping[str, Callable[[Node], Any]] = {
    "DequantizeLinear": _build_dequantize,
    "QuantizeLinear": _build_quantize,
}
