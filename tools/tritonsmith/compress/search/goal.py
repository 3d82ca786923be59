"""What a search is asked for, what it tells while it runs, and how a candidate is held against the goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritonsmith.errors import UsageError

if TYPE_CHECKING:
    from tritonsmith.compress.search.trial import Trial
    from tritonsmith.gate import GateReport

MANY_CANDIDATES = 32
HAIR = 1e-9  # a drop of 0.01 is within a budget of 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchGoal:
    """The bounds; without one on size or speed, the smallest model inside `max_drop` is looked for."""

    max_drop: float
    size_at_most_bytes: int | None = None
    speed_at_least: float | None = None  # times FP32's, one sample on one thread
    max_candidates: int = MANY_CANDIDATES  # chains that are made and measured, those made before included
    budget_s: float | None = None  # no candidate is begun after this; one that trains is finished
    epochs: int | None = None  # of each training; left out: by the number of samples
    batch_size: int = 32  # samples in one run when drops are measured

    @property
    def bounded(self) -> bool:
        return self.size_at_most_bytes is not None or self.speed_at_least is not None

    def text(self) -> str:
        parts = [f"a drop of at most {self.max_drop:g}"]
        if self.size_at_most_bytes is not None:
            parts.append(f"at most {self.size_at_most_bytes:,} bytes")
        if self.speed_at_least is not None:
            parts.append(f"at least {self.speed_at_least:g} times as fast")
        return ", ".join(parts) + ("" if self.bounded else ", as small as possible")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A candidate, or a kind of them, that was not measured; `failed`: it was tried, and cannot be made."""

    name: str
    reason: str
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a search stands, each time that something changes."""

    number: int  # of the candidate in hand, from 1; 0 before the first
    at_most: int  # candidates
    candidate: str
    state: str  # "making", "measured", "skipped", "failed", "judging"
    trials: tuple[Trial, ...]  # so far, FP32 first
    best: Trial | None  # the best so far on the tuning data
    passes: bool  # whether that one keeps all bounds there
    elapsed_s: float


def check_goal(goal: SearchGoal) -> None:
    """Raise UsageError for bounds that nothing or everything would keep."""
    if not math.isfinite(goal.max_drop) or goal.max_drop < 0:
        raise UsageError(f"--max-drop {goal.max_drop} is no budget", expected="a number from 0 on")
    for option, value in (
        ("--size-at-most", goal.size_at_most_bytes),
        ("--speed-at-least", goal.speed_at_least),
        ("--max-candidates", goal.max_candidates),
        ("--search-seconds", goal.budget_s),
    ):
        if value is not None and (not math.isfinite(value) or value <= 0):
            raise UsageError(f"{option} {value} is no bound", expected="a number above 0")
    if goal.epochs is not None and goal.epochs < 1:
        raise UsageError(f"--epochs {goal.epochs} trains nothing", expected="1 or more")


def is_within(report: GateReport, max_drop: float) -> bool:
    return report.drop <= max_drop + HAIR


def is_beyond(report: GateReport, max_drop: float) -> bool:
    """Whether the drop is beyond the budget for certain: its whole interval, or twice over without one."""
    if report.ci95_low is None:
        return report.drop > 2 * max_drop + HAIR
    return report.ci95_low > max_drop + HAIR


def misses(trial: Trial, goal: SearchGoal, judged: GateReport) -> dict[str, float]:
    """By how much each bound is missed, as a share of the bound; a kept one is left out.

    A drop is measured against the budget, or against a thousandth where there is none.
    """
    found: dict[str, float] = {}
    if goal.size_at_most_bytes is not None and trial.size_bytes > goal.size_at_most_bytes:
        found["size"] = trial.size_bytes / goal.size_at_most_bytes - 1
    if goal.speed_at_least is not None and trial.speed.ratio < goal.speed_at_least:
        found["speed"] = goal.speed_at_least / trial.speed.ratio - 1
    if not is_within(judged, goal.max_drop):
        found["drop"] = (judged.drop - goal.max_drop) / max(goal.max_drop, 1e-3)
    return found


def merit(trial: Trial, fp32: Trial, goal: SearchGoal) -> float:
    """What candidates that keep all bounds are ordered by, larger is better.

    Without a bound on size or speed that is the size alone; else the gains in size and in speed, multiplied,
    as `tritonsmith build --precision auto` chooses.
    """
    smaller = fp32.size_bytes / trial.size_bytes
    return smaller * trial.speed.ratio if goal.bounded else smaller


def ordered(trials: Sequence[Trial], fp32: Trial, goal: SearchGoal) -> list[Trial]:
    """Best first on the tuning data: those that keep all bounds by merit, then those that miss least.

    How far one misses is its largest miss: no bound makes up for another.
    """

    def key(trial: Trial) -> tuple[float, float]:
        missed = misses(trial, goal, trial.tuning)
        return (max(missed.values(), default=0.0), -merit(trial, fp32, goal))

    return sorted(trials, key=key)
