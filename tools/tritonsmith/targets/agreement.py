"""Whether a plan computes what its ONNX file says, on seeded inputs.

TensorRT sums in another order, picks other algorithms and fuses, so answers differ by rounding: how far is
a matter of precision, and TOLERANCES is the one place that says it. The ONNX file itself was judged
by the accuracy gate before, where there was data for that; what is looked for here is a plan that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec
from tritonsmith.engines.tensorrt.options import AxisRange, Profile
from tritonsmith.errors import PlanError
from tritonsmith.ingest.parity import SENTINEL, TINY
from tritonsmith.targets.order import PlanOrder

FLOATS = ("float32", "float16", "bfloat16", "float64")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a plan may be from its ONNX file."""

    worst: float | None  # |error| of any value, as a share of the output's scale plus the value itself
    relative: float  # length of a row's error beside the row's own (or the rows' usual) length
    cosine: float  # of all values of the output, at least
    same: float  # share of equal values, at least, in outputs that are not floating point


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        # Both in FP32; sums in another order, and convolutions by Winograd's algorithm.
        "fp32": Tolerance(worst=5e-4, relative=1e-4, cosine=0.99999, same=0.999),
        # Factors rounded to TF32's 10 bits (2^-11 of each), sums in FP32; a deep model adds up ten such.
        "tf32": Tolerance(worst=1e-2, relative=5e-3, cosine=0.9999, same=0.995),
        # As many bits; beside the factors each activation is rounded, and some kernels sum in FP16.
        "fp16": Tolerance(worst=3e-2, relative=1e-2, cosine=0.9999, same=0.99),
        # 7 bits: each rounding is eight times as coarse as FP16's.
        "bf16": Tolerance(worst=None, relative=8e-2, cosine=0.997, same=0.95),
        # The same grid, but a value near the middle of two steps falls to either, 1/127 of a range apart.
        "int8": Tolerance(worst=None, relative=0.12, cosine=0.993, same=0.95),
        # 3 bits of mantissa: a step is 1/8 of the value.
        "fp8": Tolerance(worst=None, relative=0.2, cosine=0.98, same=0.9),
        # Only weights are on the grid, which is read exactly; products are FP16's.
        "int4": Tolerance(worst=3e-2, relative=1e-2, cosine=0.9999, same=0.99),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call: a length for each free axis, inside one profile."""

    name: str  # "smallest", "best" or "largest"
    profile: int
    axes: Mapping[str, int]

    @property
    def batch_size(self) -> int:
        return self.axes.get(BATCH_AXIS, 1)

    def __str__(self) -> str:
        return ", ".join(f"{axis} {length}" for axis, length in self.axes.items()) or "fixed shapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One output in one case; the numbers are those of `Tolerance`, None where they have no meaning."""

    output: str
    case: Case
    values_count: int
    worst: float | None = None
    relative: float | None = None
    cosine: float | None = None
    same: float | None = None
    refusal: str | None = None

    def json(self) -> dict[str, Json]:
        return {
            "output": self.output,
            "profile": self.case.profile,
            "axes": dict(self.case.axes),
            "worst": self.worst,
            "relative": self.relative,
            "cosine": self.cosine,
            "same": self.same,
            "values": self.values_count,
            "refusal": self.refusal,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Every output in every case."""

    differences: tuple[Difference, ...]
    reference: str  # the ONNX file that was held against

    @property
    def refusal(self) -> str | None:
        """The first reason why the plan is not what its ONNX file says."""
        reason = next((item.refusal for item in self.differences if item.refusal), None)
        if reason is None and not sum(item.values_count for item in self.differences):
            return "nothing could be compared: no output has a finite value"
        return reason

    @property
    def relative(self) -> float:
        """The largest relative error, to tell the nearest of plans that were refused."""
        return max((item.relative for item in self.differences if item.relative is not None), default=0.0)

    def json(self) -> dict[str, Json]:
        return {
            "reference": self.reference,
            "passed": self.refusal is None,
            "cases": [item.json() for item in self.differences],
        }


def tolerance_of(precision: str, *, tf32: bool) -> Tolerance:
    """The tolerance of a plan; FP32 products may be TF32's where the builder was allowed to."""
    key = "tf32" if precision == "fp32" and tf32 else precision
    if key not in TOLERANCES:
        raise PlanError(
            f"no tolerance is known for plans of precision {precision!r}", expected=", ".join(TOLERANCES)
        )
    return TOLERANCES[key]


def cases_of(order: PlanOrder) -> tuple[Case, ...]:
    """The smallest, the best and the largest call of each profile, each once."""
    batch = {BATCH_AXIS: AxisRange(minimum=1, best=order.max_batch_size, maximum=order.max_batch_size)}
    profiles = order.plan.profiles or (Profile(axes=batch if order.max_batch_size else {}),)
    cases = []
    for number, profile in enumerate(profiles):
        seen = []
        for name, field in (("best", "best"), ("smallest", "minimum"), ("largest", "maximum")):
            axes = {axis: int(getattr(bounds, field)) for axis, bounds in profile.axes.items()}
            if axes not in seen:
                seen.append(axes)
                cases.append(Case(name=name, profile=number, axes=axes))
    return tuple(cases)


def compare(
    case: Case,
    specs: tuple[TensorSpec, ...],
    found: Arrays,
    expected: Arrays,
    *,
    batched: bool,
    tolerance: Tolerance,
) -> tuple[Difference, ...]:
    """Every output of one call beside what its ONNX file answers."""
    return tuple(
        _compare(case, spec, found.get(spec.name), expected[spec.name], batched, tolerance) for spec in specs
    )


def _compare(
    case: Case,
    spec: TensorSpec,
    found: NDArray[Any] | None,
    expected: NDArray[Any],
    batched: bool,
    tolerance: Tolerance,
) -> Difference:
    place = f"output {spec.name!r} at {case}"
    if found is None:
        return _refused(case, spec, f"the plan has no output {spec.name!r}")
    if found.shape != expected.shape:
        return _refused(
            case, spec, f"{place} has shape {list(found.shape)}, its ONNX file's {list(expected.shape)}"
        )
    if spec.dtype not in FLOATS:
        share = float((found == expected).mean()) if found.size else 1.0
        few = share < tolerance.same
        refusal = f"{place}: only {share:.2%} of the values are equal, {tolerance.same:.1%} are needed"
        return Difference(
            output=spec.name,
            case=case,
            same=share,
            values_count=found.size,
            refusal=refusal if few else None,
        )
    return _compare_floats(
        case, spec, found.astype(np.float64), expected.astype(np.float64), batched, tolerance
    )


def _compare_floats(
    case: Case,
    spec: TensorSpec,
    have: NDArray[Any],
    want: NDArray[Any],
    batched: bool,
    tolerance: Tolerance,
) -> Difference:
    place = f"output {spec.name!r} at {case}"
    both = np.isfinite(have) & np.isfinite(want)
    alike = both | (np.isnan(have) & np.isnan(want)) | (have == want)
    if not alike.all():
        return _refused(case, spec, f"{place}: {int((~alike).sum())} values are finite on one side alone")
    # Masks of -1e9 and the like say nothing about the size of an output.
    told = both & (np.abs(want) < SENTINEL)
    want = np.where(told, want, 0.0)
    error = np.where(told, have, 0.0) - want
    scale = np.abs(want).max(initial=0.0)
    worst = float((np.abs(error) / np.maximum(scale + np.abs(want), TINY)).max(initial=0.0))
    relative = _relative(error, want, batched)
    cosine = _cosine(want + error, want)
    reasons = []
    if tolerance.worst is not None and worst > tolerance.worst:
        reasons.append(f"a value is off by {worst:.2g} of the output's scale, {tolerance.worst:g} is allowed")
    if relative > tolerance.relative:
        reasons.append(f"a relative error of {relative:.2g}, {tolerance.relative:g} is allowed")
    if cosine < tolerance.cosine:
        reasons.append(f"a cosine of {cosine:.4f}, {tolerance.cosine:g} is needed")
    return Difference(
        output=spec.name,
        case=case,
        worst=worst,
        relative=relative,
        cosine=cosine,
        values_count=int(told.sum()),
        refusal=f"{place}: {'; '.join(reasons)}" if reasons else None,
    )


def _relative(error: NDArray[Any], want: NDArray[Any], batched: bool) -> float:
    """The largest of the rows: one wrong row in a large batch must show."""
    if not error.size:
        return 0.0
    rows = len(error) if batched and error.ndim else 1
    errors = np.linalg.norm(error.reshape(rows, -1), axis=1)
    lengths = np.linalg.norm(want.reshape(rows, -1), axis=1)
    usual = np.sqrt(np.mean(lengths**2))
    return float((errors / np.maximum(np.maximum(lengths, usual), TINY)).max())


def _cosine(have: NDArray[Any], want: NDArray[Any]) -> float:
    lengths = float(np.linalg.norm(have) * np.linalg.norm(want))
    if lengths < TINY:
        return 1.0 if np.array_equal(have, want) else 0.0
    return float(np.vdot(have, want) / lengths)


def _refused(case: Case, spec: TensorSpec, reason: str) -> Difference:
    return Difference(output=spec.name, case=case, values_count=0, refusal=reason)
