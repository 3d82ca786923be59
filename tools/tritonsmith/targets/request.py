"""What a recipe asks of a target: `[target.<name>]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tritonsmith.artifact import Json
from tritonsmith.engines.tensorrt.options import PlanOptions

TARGET_BACKENDS = ("tensorrt", "onnxruntime", "openvino")
TARGET_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRequest:
    """A further target of a model."""

    name: str  # configs/<name>.pbtxt, and the start of its files' names
    backend: str  # one of TARGET_BACKENDS
    # Of a plan; "auto": the fastest that passes the gate. Other backends serve what the model's chain made.
    precision: str = "auto"
    max_batch_size: int | None = None  # None: the default's; never more than that
    config: Mapping[str, Json] = field(default_factory=dict)  # fields of model_config.proto
    plan: PlanOptions = field(default_factory=PlanOptions)  # tensorrt only
    traffic: Path | None = None  # Triton's own statistics of this model, saved as JSON: profiles from them
    without_plan: str = "fail"  # or "defer": as --defer; "fallback": ONNX with TensorRT's execution provider
    allow_slow_int8: bool = False  # publish INT8 that is no faster than FP16
