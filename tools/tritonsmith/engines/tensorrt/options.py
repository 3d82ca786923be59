"""How a plan is to be built: the records that a recipe, a plan order and the builder share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisRange:
    """The lengths of a free axis that a profile takes, and the one that it is tuned for."""

    minimum: int
    best: int
    maximum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An optimization profile: a range for each free axis, by the axis' name in the model's signature."""

    axes: Mapping[str, AxisRange]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the builder may do. Precision is not here: it lives in the ONNX graph."""

    profiles: tuple[
        Profile, ...
    ] = ()  # empty: one, from the largest batch; other free axes then need a range
    optimization_level: int = 3  # 0 to 5: how long the builder looks for fast kernels
    workspace_bytes: int | None = None  # None: what the GPU has
    tf32: bool = True  # FP32 products on TF32 tensor cores
    sparse_weights: bool = False  # 2:4 kernels where the weights have that pattern
    version_compatible: bool = False  # a plan that newer versions of the same major run too
    hardware_compatibility: str = "none"  # "ampere_plus", "same_compute_capability"
    strip_weights: bool = False  # a plan without weights, refitted from the ONNX file when it is loaded
