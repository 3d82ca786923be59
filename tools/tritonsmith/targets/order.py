"""A plan order: all that a GPU machine needs to build a deferred plan, beside the ONNX files in the version.

<repository>/<model>/configs/<target>.pbtxt
<repository>/<model>/<version>/<target>.<precision>.onnx    a candidate each, in TensorRT's dialect
<repository>/<model>/<version>/<target>.order.json          this record
<repository>/<model>/<version>/<target>.sm90.plan           once built there; else in the cache of plans
"""

from __future__ import annotations

from dataclasses import dataclass

from tritonsmith.artifact import TensorSpec
from tritonsmith.engines.tensorrt.options import PlanOptions

ORDER_SCHEMA = 1
FLOATING = ("fp16", "bf16", "fp32")  # the first that there is is the yardstick of speed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCandidate:
    """An ONNX file to be compiled and timed; the accuracy gate passed it where there was data to judge by."""

    file: str
    sha256: str
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOrder:
    """What to compile, how, and how to choose; `fingerprint` covers all but the machine."""

    target: str
    candidates: tuple[PlanCandidate, ...]  # floating point before INT8
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int  # 0: no batch axis
    plan: PlanOptions  # with its profiles filled in
    precision: str  # asked for, or "auto"
    allow_slow_int8: bool
    fallback: str | None  # candidate's file to serve by ONNX Runtime where no plan can be built
    fingerprint: str
