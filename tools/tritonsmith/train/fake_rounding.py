"""Weights and activations rounded in training as they will be when they are served."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tritonsmith.compress.weight_only.blocks import Grid

HIGHEST_UINT8 = 255.0


class StraightThrough(torch.autograd.Function):
    """Gives the second tensor and hands its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class FakeRounding(nn.Module):
    """A weight as `compress.blocks` would round it to `grid`; the gradient passes straight through.

    The grid stays where it is, so what was trained for is what is stored.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.axis, self.block = grid.axis, grid.block
        self.lowest, self.highest = grid.lowest, grid.highest
        self.steps = _tensor(grid.steps, grid.axis + 1)
        self.multipliers: torch.Tensor | None = None
        self.scales: torch.Tensor | None = None
        if grid.multipliers is not None and grid.scales is not None:
            self.multipliers = _tensor(grid.multipliers, grid.axis + 1)
            self.scales = _tensor(grid.scales, grid.axis)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            rounded = self._rounded(weight)
        return pass_straight(weight, rounded)

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        axis, block, length = self.axis, self.block, weight.shape[self.axis]
        if missing := -length % block:
            weight = nn.functional.pad(weight, (0, 0, 0, missing) if axis == 0 else (0, missing))
        shape = list(weight.shape)
        shape[axis : axis + 1] = [shape[axis] // block, block]
        codes = torch.clamp(torch.round(weight.reshape(shape) / self.steps), self.lowest, self.highest)
        factors = self.steps if self.multipliers is None else self.multipliers
        joined = (codes * factors).flatten(axis, axis + 1).narrow(axis, 0, length)
        return joined if self.scales is None else joined * self.scales


class FakeDynamicUint8(nn.Module):
    """An activation as DynamicQuantizeLinear would round it: one uint8 range for the whole tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            low, high = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
            scale = torch.where(high > low, (high - low) / HIGHEST_UINT8, torch.ones_like(high))
            zero = torch.clamp(torch.round(-low / scale), 0, HIGHEST_UINT8)
            codes = torch.clamp(torch.round(x / scale) + zero, 0, HIGHEST_UINT8)
            rounded = (codes - zero) * scale
        return pass_straight(x, rounded)


def pass_straight(source: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of `rounded`, whose gradient goes to `source` (Bengio et al., arXiv 1308.3432)."""
    result: torch.Tensor = StraightThrough.apply(source, rounded)  # type: ignore[no-untyped-call]
    return result


def _tensor(values: Any, axis: int) -> torch.Tensor:
    return torch.from_numpy(values).float().unsqueeze(axis)
