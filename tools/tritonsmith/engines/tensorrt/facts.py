"""What a plan is: where it was built, and therefore where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tritonsmith.artifact import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU and the software over it."""

    gpu: str  # "NVIDIA H100 80GB HBM3"
    compute_capability: str  # "9.0"
    driver: str  # "580.159.04"
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """One plan, as manifest.json and the cache of plans record it."""

    file: str  # beside it, or in the version folder
    sha256: str
    size_bytes: int
    source: str  # file name of the ONNX model that it was built from
    source_sha256: str  # of that file alone, not of weights that it keeps in another one
    precision: str  # "fp32", "fp16", "bf16", "int8", "fp8", "int4"
    tensorrt: str  # "10.16.1.11"
    device: Device
    version_compatible: bool
    hardware_compatibility: str
    stripped: bool
    duration_s: float
    # "layers": the inspector's report, "agreement": with its ONNX by output and batch, "speed": by batch
    measured: Mapping[str, Json] = field(default_factory=dict)
