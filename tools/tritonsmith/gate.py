"""The accuracy gate: a candidate against the FP32 model, on the engine that will serve it.

It passes when the measured drop is at most the budget. The drop is "how much worse", whatever the metric.
Its 95 % interval comes from a paired bootstrap over the samples (Efron, 1979; percentile method, fixed
seed); where its upper end lies beyond the budget, the gate passes and the report says `certain: false`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.artifact import Json
from tritonsmith.engines import Session
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.metrics import SHARES, Metric, Outputs, Scores, score
from tritonsmith.samples import Samples

Array = NDArray[Any]

RESAMPLES = 10_000
FEWEST_RESAMPLES = 1_000
DRAWS = 30_000_000  # resamples times distinct samples: bounds time to a few seconds
CHUNK_DRAWS = 4_000_000  # bounds memory
SEED = 20_260_101
ROUNDING = 1e-9  # a drop of 0.01 must pass a budget of 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstClass:
    """The class whose share of hits fell most; `label` as it stands in the labels."""

    label: str
    samples: int
    baseline: float
    candidate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the gate measured; `drop` is positive where the candidate is worse."""

    metric: str
    higher_is_better: bool
    baseline: float
    candidate: float  # NaN where the outputs are
    drop: float
    ci95_low: float | None  # None: the metric gives one number, so there is no interval
    ci95_high: float | None
    samples: int
    max_drop: float | None  # None: recorded, not judged
    passed: bool
    reason: str
    worst_class: WorstClass | None

    @property
    def certain(self) -> bool:
        """Whether the whole interval of the drop lies within the budget."""
        if self.max_drop is None or self.ci95_high is None:
            return False
        return self.ci95_high <= self.max_drop + ROUNDING

    def json(self) -> dict[str, Json]:
        worst = self.worst_class
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "baseline": _number(self.baseline),
            "candidate": _number(self.candidate),
            "drop": _number(self.drop),
            "ci95_low": self.ci95_low,
            "ci95_high": self.ci95_high,
            "samples": self.samples,
            "max_drop": self.max_drop,
            "passed": self.passed,
            "certain": self.certain,
            "reason": self.reason,
            "worst_class": None
            if worst is None
            else {
                "label": worst.label,
                "samples": worst.samples,
                "baseline": worst.baseline,
                "candidate": worst.candidate,
            },
        }


def check_budget(metric: Metric, max_drop: float | None) -> None:
    """Raise UsageError for a budget that is negative, no number, or above any possible drop."""
    if max_drop is None:
        return
    if not math.isfinite(max_drop) or max_drop < 0:
        raise UsageError(f"--max-drop {max_drop} is no budget", expected="a number from 0 on")
    if metric.name in SHARES and max_drop >= 1:
        raise UsageError(
            f"--max-drop {max_drop:g} would let everything pass: {metric.name} is a share of 1",
            fix="0.01 is one percentage point",
        )


def predict(session: Session, samples: Samples, *, batched: bool, batch_size: int) -> dict[str, Array]:
    """Outputs by name for all samples, `[N, ...]`, computed `batch_size` samples at a time."""
    parts: list[dict[str, Array]] = []
    if batched:
        for start in range(0, samples.count, max(1, batch_size)):
            stop = start + max(1, batch_size)
            parts.append(session.run({name: array[start:stop] for name, array in samples.arrays.items()}))
    else:
        for index in range(samples.count):
            outputs = session.run({name: array[index] for name, array in samples.arrays.items()})
            parts.append({name: array[None] for name, array in outputs.items()})
    return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def judge(
    metric: Metric,
    *,
    baseline: Outputs,
    candidate: Outputs,
    target: Array | None,
    max_drop: float | None,
    say: Callable[[str], None] = lambda _: None,
) -> GateReport:
    """Measure how much worse `candidate` is than `baseline`, outputs by name `[N, ...]`, on one metric.

    Raises:
        SamplesError: labels that are missing or do not fit.
        UsageError: a metric that cannot be computed on these outputs, or a budget that is none.
    """
    check_budget(metric, max_drop)
    before = score(metric, baseline, target=target, reference=baseline)
    count = len(next(iter(baseline.values())))
    if broken := _broken(candidate):
        return _refusal(metric, before.value(), count, max_drop, broken)
    if broken := _broken(baseline):
        reason = f"there is nothing to compare with: in the baseline, {broken}"
        return _refusal(metric, before.value(), count, max_drop, reason)
    after = score(metric, candidate, target=target, reference=baseline)
    old, new = before.value(), after.value()
    if not (math.isfinite(old) and math.isfinite(new)):
        return _refusal(metric, old, count, max_drop, f"the metric is {old:g} before and {new:g} after")
    drop = float(metric.drop(np.float64(old), np.float64(new)))
    low, high = _interval(metric, before, after)
    passed = max_drop is None or drop <= max_drop + ROUNDING
    report = GateReport(
        metric=metric.text,
        higher_is_better=metric.higher_is_better,
        baseline=old,
        candidate=new,
        drop=drop,
        ci95_low=low,
        ci95_high=high,
        samples=count,
        max_drop=max_drop,
        passed=passed,
        reason=_reason(drop, high, count, max_drop),
        worst_class=_worst_class(before, after),
    )
    say(f"{metric.text} {old:.4f} -> {new:.4f}: {report.reason}")
    return report


def _reason(drop: float, high: float | None, count: int, max_drop: float | None) -> str:
    if max_drop is None:
        return "recorded without a budget"
    if drop > max_drop + ROUNDING:
        return f"the drop of {drop:.4g} is beyond the budget of {max_drop:g}"
    if high is None:
        return f"the drop of {drop:.4g} is within the budget of {max_drop:g}; one number has no interval"
    if high > max_drop + ROUNDING:
        return (
            f"the drop of {drop:.4g} is within the budget of {max_drop:g}, but not certain with {count} "
            f"samples: it may be up to {high:.4g}"
        )
    return f"the drop of {drop:.4g} (at most {high:.4g}) is within the budget of {max_drop:g}"


def _refusal(metric: Metric, baseline: float, count: int, max_drop: float | None, reason: str) -> GateReport:
    return GateReport(
        metric=metric.text,
        higher_is_better=metric.higher_is_better,
        baseline=baseline,
        candidate=math.nan,
        drop=math.nan,
        ci95_low=None,
        ci95_high=None,
        samples=count,
        max_drop=max_drop,
        passed=False,
        reason=reason,
        worst_class=None,
    )


def _broken(outputs: Outputs) -> str | None:
    for name, array in outputs.items():
        if array.dtype.kind == "f":
            bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            if bad.any():
                return f"output {name!r} is NaN or infinite for {int(bad.sum())} of {len(array)} samples"
    return None


def _interval(metric: Metric, before: Scores, after: Scores) -> tuple[float | None, float | None]:
    """The 2.5 and 97.5 percentiles of the drop over resamples of the samples, pairs kept together.

    Equal rows are one category of a multinomial draw, which makes the same distribution in less time.
    """
    if before.scalar is not None or after.scalar is not None:
        return None, None
    width = before.rows.shape[1]
    both = np.concatenate([before.rows, after.rows], axis=1)
    rows, counts = np.unique(both, axis=0, return_counts=True)
    samples = int(counts.sum())
    resamples = int(np.clip(DRAWS // len(rows), FEWEST_RESAMPLES, RESAMPLES))
    chunk = max(1, CHUNK_DRAWS // len(rows))
    rng = np.random.default_rng(SEED)
    drops = []
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(samples, counts / samples, size=min(chunk, resamples - start))
        old, new = before.total(rows[:, :width], drawn), after.total(rows[:, width:], drawn)
        drops.append(metric.drop(old, new))
    low, high = np.percentile(np.concatenate(drops), [2.5, 97.5])
    return float(low), float(high)


def _worst_class(before: Scores, after: Scores) -> WorstClass | None:
    if before.classes is None or before.hits is None or after.hits is None:
        return None
    labels, codes, counts = np.unique(before.classes, return_inverse=True, return_counts=True)
    old = np.bincount(codes, before.hits) / counts
    new = np.bincount(codes, after.hits) / counts
    worst = int(np.argmax(old - new))
    label = labels[worst]
    return WorstClass(
        label=label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label),
        samples=int(counts[worst]),
        baseline=float(old[worst]),
        candidate=float(new[worst]),
    )


def _joined(name: str, parts: list[Array]) -> Array:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise SamplesError(
            f"output {name!r} has another shape for other samples, so its rows cannot be scored together",
            found=", ".join(str(list(shape)) for shape in sorted(shapes)),
        )
    joined = np.concatenate(parts)
    narrow = joined.dtype.kind not in "iubfO" or joined.dtype == np.float16  # bfloat16 is of kind V
    return joined.astype(np.float32) if narrow else joined


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
