"""What a validation found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from tritonsmith.artifact import Json
from tritonsmith.gate import GateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The value that is furthest off: its sample, its place in that sample's output, and both values."""

    sample: int
    place: tuple[int, ...]
    served: str
    expected: str

    def __str__(self) -> str:
        place = f" at {list(self.place)}" if self.place else ""
        return f"sample {self.sample}{place}: served {self.served}, expected {self.expected}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One output over one protocol in one mode. With a `tolerance` of None it is recorded, not judged."""

    protocol: str
    mode: str
    against: str
    output: str
    samples_count: int
    values_count: int
    max_abs_error: float
    max_rel_error: float  # of the output's scale
    tolerance: float | None
    passed: bool
    worst: Worst | None  # None where every value is equal

    def json(self) -> dict[str, Json]:
        """As the record; an error that is infinite is null, which JSON can hold."""
        errors = {"max_abs_error": self.max_abs_error, "max_rel_error": self.max_rel_error}
        finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
        return {**asdict(self), **finite}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """What the server's statistics say about one protocol's concurrent requests to one model."""

    protocol: str
    model: str
    samples_count: int
    executions_count: int
    largest_batch: int

    @property
    def mixed(self) -> bool:
        return self.largest_batch > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """What was compared and how it came out."""

    model: str
    version: int | None  # None for an ensemble without a manifest
    samples: str
    samples_sha256: str
    samples_count: int
    checks: tuple[Check, ...]
    mixing: tuple[Mixing, ...]
    metric: GateReport | None
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Every judged check and the metric passed, and at least one of them was judged."""
        judged = [check.passed for check in self.checks if check.tolerance is not None]
        if self.metric is not None and (self.metric.max_drop is not None or not self.metric.passed):
            judged.append(self.metric.passed)
        return bool(judged) and all(judged)

    def json(self) -> dict[str, Json]:
        return {
            "passed": self.passed,
            "model": self.model,
            "version": self.version,
            "samples": self.samples,
            "samples_sha256": self.samples_sha256,
            "samples_count": self.samples_count,
            "checks": [check.json() for check in self.checks],
            "mixing": [{**asdict(item), "mixed": item.mixed} for item in self.mixing],
            "metric": None if self.metric is None else self.metric.json(),
            "notes": self.notes,
        }
