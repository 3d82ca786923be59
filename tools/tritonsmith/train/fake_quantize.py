"""Quantization as it will be, computed in floating point with gradients.

Rounding passes gradients on as they are (Jacob et al., arXiv 1712.05877); what is clipped has none. The step
of an activation is learned with the weights: its gradient is that of LSQ (Esser et al., arXiv 1902.08153),
taken in the logarithm of the step, so that an optimiser changes it by shares and never past zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SMALLEST = 1e-30  # the largest value of a channel of zeros; any step keeps those


class FakeActivation(nn.Module):
    """One scale and zero point for a tensor; beyond the integers `lowest` and `highest` it is clipped."""

    def __init__(self, scale: float, zero_point: int, lowest: int, highest: int, *, learned: bool) -> None:
        super().__init__()
        self._scale, self._zero_point = scale, zero_point
        self._lowest, self._highest = lowest, highest
        self.logarithm = nn.Parameter(torch.zeros(()), requires_grad=learned)  # of the step's change

    def scale(self) -> float:
        """The step as it is now."""
        return self._scale * math.exp(float(self.logarithm.detach()))

    def value_range(self) -> tuple[float, float]:
        """The lowest and highest value that is not clipped."""
        scale = self.scale()
        return (self._lowest - self._zero_point) * scale, (self._highest - self._zero_point) * scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self._scale * torch.exp(self.logarithm)
        steps = _rounded(x / scale)
        low, high = self._lowest - self._zero_point, self._highest - self._zero_point
        return torch.clamp(steps, low, high) * scale


class FakeWeight(nn.Module):
    """Symmetric, the largest magnitude of each channel along `axis` (None: of the whole) at `limit` steps."""

    def __init__(self, axis: int | None, limit: int) -> None:
        super().__init__()
        self._axis, self._limit = axis, limit

    def forward(self, weight: Tensor) -> Tensor:
        magnitudes = weight.detach().abs()
        others = [axis for axis in range(weight.ndim) if axis != self._axis]
        largest = magnitudes.amax(dim=others, keepdim=True) if others else magnitudes
        scale = torch.clamp(largest, min=SMALLEST) / self._limit
        return _rounded(weight / scale) * scale


class FakeBias(nn.Module):
    """A bias in INT32, whose steps `[C]` or `[]` are those of its layer's input times those of its weights.

    They stay as they were when training began: a bias is rounded finely, unless its input has huge steps.
    """

    def __init__(self, steps: Tensor) -> None:
        super().__init__()
        self.register_buffer("steps", steps, persistent=False)

    def forward(self, bias: Tensor) -> Tensor:
        steps = self.get_buffer("steps")
        return _rounded(bias / steps) * steps


def _rounded(steps: Tensor) -> Tensor:
    return steps + (torch.round(steps) - steps).detach()
