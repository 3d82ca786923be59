"""How fast two models are beside each other, in one process, on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.artifact import Json
from tritonsmith.engines import Session

Inputs = Mapping[str, NDArray[Any]]

THREADS = 1  # of each session: the steadiest on a shared machine, and the same for both
ROUNDS = 101
ROUND_S = 0.008  # each model runs about this long in a round
LONGEST_S = 10.0  # fewer rounds for slow models
FEWEST_ROUNDS = 9
ALIKE = 0.02  # a ratio within this of 1 is no difference that anyone would notice


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRatio:
    """How many times as fast as the baseline: the median of the rounds' ratios and its 95 % interval."""

    ratio: float
    low: float
    high: float
    rounds: int
    baseline_ms: float  # median of one run
    candidate_ms: float
    batch_size: int

    @property
    def slower(self) -> bool:
        """Whether the baseline is faster beyond doubt, or by more than a hair."""
        return self.high < 1.0 or self.ratio < 1.0 - ALIKE

    def json(self) -> dict[str, Json]:
        return {
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "rounds": self.rounds,
            "baseline_ms": self.baseline_ms,
            "candidate_ms": self.candidate_ms,
            "batch_size": self.batch_size,
            "threads": THREADS,
        }


def compare_speed(baseline: Session, candidate: Session, inputs: Inputs, *, batch_size: int) -> SpeedRatio:
    """How many times as fast as `baseline` the `candidate` is, as `compare_speeds` measures it."""
    return compare_speeds(baseline, (candidate,), inputs, batch_size=batch_size)[0]


def compare_speeds(
    baseline: Session, candidates: Sequence[Session], inputs: Inputs, *, batch_size: int
) -> tuple[SpeedRatio, ...]:
    """Time all models in alternating rounds, so that a change of the machine's pace meets each of them.

    The order within a round alternates too. The interval of the median is that of order statistics
    (Hahn and Meeker, Statistical Intervals, 5.2), which takes no distribution for granted.
    """
    times_s = time_rounds((baseline, *candidates), inputs)
    sides = range(1, len(candidates) + 1)
    return tuple(ratio_from_times(times_s[:, 0], times_s[:, side], batch_size) for side in sides)


def time_rounds(sessions: Sequence[Session], inputs: Inputs) -> NDArray[Any]:
    """Seconds of one run of each session in alternating rounds: [rounds, sessions]."""
    counts = [_runs_per_round(session, inputs) for session in sessions]
    longest = max(ROUND_S, *(_time_runs(session, inputs, 1) for session in sessions))
    rounds = int(np.clip(LONGEST_S / (2 * longest), FEWEST_ROUNDS, ROUNDS)) | 1  # odd: one in the middle
    times_s = np.empty((rounds, len(sessions)))
    for index in range(rounds):
        for side in range(len(sessions))[:: 1 if index % 2 == 0 else -1]:
            times_s[index, side] = _time_runs(sessions[side], inputs, counts[side]) / counts[side]
    return times_s


def ratio_from_times(baseline_s: NDArray[Any], candidate_s: NDArray[Any], batch_size: int) -> SpeedRatio:
    """The ratio of two models' seconds in the same rounds, and the interval of its median."""
    rounds = len(baseline_s)
    ratios = np.sort(baseline_s / candidate_s)
    reach = int(np.ceil(0.98 * np.sqrt(rounds)))  # 1.96 standard deviations of a binomial of one half
    middle = rounds // 2
    return SpeedRatio(
        ratio=float(np.median(ratios)),
        low=float(ratios[max(0, middle - reach)]),
        high=float(ratios[min(rounds - 1, middle + reach)]),
        rounds=rounds,
        baseline_ms=float(np.median(baseline_s) * 1e3),
        candidate_ms=float(np.median(candidate_s) * 1e3),
        batch_size=batch_size,
    )


def _runs_per_round(session: Session, inputs: Inputs) -> int:
    _time_runs(session, inputs, 1)  # the first run allocates
    return max(1, int(ROUND_S / max(_time_runs(session, inputs, 1), 1e-6)))


def _time_runs(session: Session, inputs: Inputs, count: int) -> float:
    began_s = time.perf_counter()
    for _ in range(count):
        session.run(inputs)
    return time.perf_counter() - began_s
