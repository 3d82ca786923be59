"""Which of an order's plans is published: the decision, and what it is made from.

The yardstick of speed is the FP16 plan where there is one. It stays unless another is faster beyond doubt:
the whole interval of the ratio above 1, at the size that each profile is tuned for. So INT8 that is no
faster than FP16 is not published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tritonsmith.artifact import Json
from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.errors import NotCompiledError, PlanError
from tritonsmith.measure import SpeedRatio
from tritonsmith.targets.agreement import Agreement, Case
from tritonsmith.targets.order import FLOATING, PlanCandidate, PlanOrder

QUANTIZED = ("int8", "fp8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A plan beside the yardstick in one case; `samples_s` are the rounds' seconds of both."""

    case: Case
    speed: SpeedRatio
    samples_s: tuple[tuple[float, float], ...]  # (yardstick, plan)

    def json(self) -> dict[str, Json]:
        speed = {name: value for name, value in self.speed.json().items() if name != "threads"}
        return {
            "case": self.case.name,
            "profile": self.case.profile,
            "axes": dict(self.case.axes),
            **speed,
            "samples_s": [list(pair) for pair in self.samples_s],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of one candidate; `refusal` says why it is not published."""

    candidate: PlanCandidate
    plan: Path | None = None  # None: it could not be compiled
    facts: PlanFacts | None = None
    agreement: Agreement | None = None
    yardstick: str | None = None  # precision that it was timed beside
    timings: tuple[Timing, ...] = ()
    refusal: str | None = None
    notes: tuple[str, ...] = ()
    chosen: bool = False

    @property
    def passing(self) -> bool:
        return self.plan is not None and self.refusal is None

    @property
    def best(self) -> tuple[SpeedRatio, ...]:
        """The speeds that decide: at the best size of each profile."""
        return tuple(timing.speed for timing in self.timings if timing.case.name == "best")

    @property
    def ratio(self) -> float:
        """How many times as fast as the yardstick: the geometric mean over the profiles."""
        return math.exp(sum(math.log(speed.ratio) for speed in self.best) / max(1, len(self.best)))

    def json(self) -> dict[str, Json]:
        return {
            "file": self.candidate.file,
            "precision": self.candidate.precision,
            "bytes": None if self.facts is None else self.facts.size_bytes,
            "build_s": None if self.facts is None else self.facts.duration_s,
            "agreement": None if self.agreement is None else self.agreement.json(),
            "yardstick": self.yardstick,
            "speed": [timing.json() for timing in self.timings],
            "chosen": self.chosen,
            "refusal": self.refusal,
            "notes": list(self.notes),
        }


def decide(trials: Sequence[Trial], order: PlanOrder) -> list[Trial]:
    """The same trials, one of them chosen, the others with the reason why not.

    Raises:
        PlanError: none can be published; NotCompiledError where none was even compiled.
    """
    trials = [_out_if_slow(trial, order) for trial in trials]
    asked = [trial for trial in trials if order.precision in ("auto", trial.candidate.precision)]
    passing = [trial for trial in asked if trial.passing]
    if not passing:
        raise _nothing_passes(trials, asked, order)
    best = max(passing, key=_merit)
    return [
        replace(trial, chosen=True)
        if trial is best
        else replace(trial, refusal=trial.refusal or _lost(trial, best, order))
        for trial in trials
    ]


def yardstick_of(trials: Sequence[Trial]) -> Trial | None:
    """The plan that others are timed beside; one that is wrong still shows what FP16 costs."""
    ran = {trial.candidate.precision: trial for trial in reversed(trials) if trial.agreement is not None}
    return next((ran[precision] for precision in FLOATING if precision in ran), None)


def speed_text(speed: SpeedRatio) -> str:
    return f"{speed.ratio:.2f} times the speed ({speed.low:.2f} to {speed.high:.2f})"


def _out_if_slow(trial: Trial, order: PlanOrder) -> Trial:
    quantized = trial.candidate.precision in QUANTIZED
    slow = next(
        (timing for timing in trial.timings if timing.case.name == "best" and not timing.speed.low > 1), None
    )
    if not trial.passing or not quantized or slow is None:
        return trial
    reason = f"no faster than {trial.yardstick} at {slow.case}: {speed_text(slow.speed)}"
    if order.allow_slow_int8:
        return replace(trial, notes=(*trial.notes, f"{reason}; the recipe allows it"))
    return replace(trial, refusal=reason)


def _merit(trial: Trial) -> tuple[bool, float]:
    """Faster than the yardstick beyond doubt, the yardstick itself, and then the rest."""
    if not trial.timings:
        return True, 1.0
    return all(speed.low > 1 for speed in trial.best), trial.ratio


def _lost(trial: Trial, best: Trial, order: PlanOrder) -> str:
    if order.precision != "auto":
        return f"{order.precision} was asked for"
    speed = next(iter((trial if best.yardstick is None else best).best), None)
    told = "" if speed is None or trial.yardstick == best.yardstick else f": {speed_text(speed)}"
    if best.yardstick is None:
        return f"not faster than {best.candidate.precision} beyond doubt{told}"
    return f"{best.candidate.precision} is faster{told}"


def _nothing_passes(trials: Sequence[Trial], asked: Sequence[Trial], order: PlanOrder) -> PlanError:
    ranked = sorted(asked or trials, key=_distance)
    lines = [f"{trial.candidate.precision} ({trial.candidate.file}): {trial.refusal}" for trial in ranked]
    lines += [] if asked else [f"no candidate is {order.precision}"]
    nearest = ranked[0]
    only_slow = nearest.agreement is not None and nearest.agreement.refusal is None
    wish = 'allow_slow_int8 = true or precision = "auto"' if only_slow else "another precision"
    kind = PlanError if any(trial.plan for trial in ranked) else NotCompiledError
    return kind(
        f"target {order.target!r}: no plan can be published; the best is {nearest.candidate.precision}",
        found="; ".join(lines),
        fix=f"set {wish} in [target.{order.target}] and build again",
    )


def _distance(trial: Trial) -> tuple[int, float]:
    """One that agrees but is slow, then the smallest error, then what could not be compared."""
    if trial.agreement is None:
        return 2, 0.0
    return (1, trial.agreement.relative) if trial.agreement.refusal else (0, -trial.ratio)
