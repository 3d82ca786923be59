"""What a search found: the front, the model that was picked, and, where none passes, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress.chain import Material, run_chain
from tritonsmith.compress.search.goal import SearchGoal, Skipped, is_within, misses
from tritonsmith.compress.search.pareto import front_of
from tritonsmith.compress.search.space import Facts
from tritonsmith.compress.search.trial import Trial, Yardstick
from tritonsmith.compress.step_text import text_from_spec
from tritonsmith.compress.steps import Trained
from tritonsmith.console import human_bytes
from tritonsmith.gate import GateReport

ROW_COLUMNS = (
    *("", "", "candidate", "size", "smaller", "speed", "drop on tuning data"),
    *("drop on evaluation data", "misses"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What one step of the picked chain did: its bytes, and what it added to the drop on the tuning data."""

    step: str
    bytes_before: int
    bytes_after: int
    drop: float  # added by this step


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Always a model, `best`: it keeps all bounds where `passed`, else it misses them least.

    `best.evaluation` is the judgement that counts. `looks` says how many candidates the evaluation data
    judged before it: each look makes its drop a little flattering.
    """

    goal: SearchGoal
    material: Material  # as the steps had it: less what was held back to choose on
    best: Trial
    artifacts: tuple[Artifact, ...]  # FP32, then after each step of the best
    passed: bool
    looks: int
    missed: tuple[str, ...]  # a line for each bound that the best does not keep
    trials: tuple[Trial, ...]  # all that were measured, in order, FP32 first
    front: tuple[Trial, ...]  # of bytes, latency and drop on the tuning data, smallest first
    skipped: tuple[Skipped, ...]
    blame: tuple[Blame, ...]
    next_steps: tuple[str, ...]
    ended: str  # "complete", "interrupted", or which budget is used up
    tuned_on: str  # the tuning data, in words
    machine: Mapping[str, Json]

    def json(self) -> dict[str, Json]:
        return {
            "goal": asdict(self.goal),
            "passed": self.passed,
            "best": self.best.json(),
            "looks": self.looks,
            "missed": list(self.missed),
            "trials": [
                {**trial.json(), "misses": list(misses(trial, self.goal, trial.evaluation or trial.tuning))}
                for trial in self.trials
            ],
            "front": [trial.name for trial in self.front],
            "skipped": [asdict(skip) for skip in self.skipped],
            "blame": [asdict(blame) for blame in self.blame],
            "next_steps": list(self.next_steps),
            "ended": self.ended,
            "tuned_on": self.tuned_on,
            "machine": dict(self.machine),
        }


def conclude(
    trials: Sequence[Trial],
    judged: Sequence[Trial],
    skipped: Sequence[Skipped],
    goal: SearchGoal,
    material: Material,
    facts: Facts,
    yardstick: Yardstick,
    *,
    ended: str,
    store: Path,
) -> SearchResult:
    """The result of a search; `judged` came before the evaluation data, the last of them possibly passing."""
    passing = [trial for trial in judged if not misses(trial, goal, _evaluated(trial))]
    best = passing[0] if passing else min(judged, key=lambda trial: _worst_miss(trial, goal))
    known = {trial.specs: trial for trial in judged}
    trials = tuple(known.get(trial.specs, trial) for trial in trials)
    points = {trial.specs: trial.point() for trial in trials}
    front = front_of(list(points.values()))
    named = {trial.name: trial for trial in trials}
    artifacts = run_chain(best.specs, material, store=store)
    tuning = material.tuning
    missed = tuple(_missed_text(best, goal))
    return SearchResult(
        goal=goal,
        material=material,
        best=best,
        artifacts=(yardstick.teacher, *artifacts),
        passed=bool(passing),
        looks=len(judged),
        missed=missed,
        trials=trials,
        front=tuple(named[point.name] for point in front),
        skipped=tuple(skipped),
        blame=_blame(best, artifacts, yardstick),
        next_steps=() if passing else tuple(_next_steps(trials, best, goal, material, facts, ended)),
        ended=ended,
        tuned_on=f"{tuning.count} samples of {tuning.path.name}" if tuning is not None else "",
        machine=yardstick.machine,
    )


def trial_rows(search: Mapping[str, Any], *, front_only: bool = False) -> list[tuple[str, ...]]:
    """A row (`ROW_COLUMNS`) for each candidate of a search in its JSON form, in the order of trial."""
    trials = search["trials"]
    rows: list[tuple[str, ...]] = []
    for number, trial in enumerate(trials, 1):
        on_front = trial["name"] in search["front"]
        if front_only and not on_front:
            continue
        state = "front" if on_front else ""
        if trial["name"] == search["best"]["name"]:
            state = "chosen" if search["passed"] else "nearest"
        rows.append(
            (
                str(number),
                state,
                trial["name"],
                human_bytes(trial["bytes"]),
                f"{trials[0]['bytes'] / trial['bytes']:.2f}x",
                f"{trial['speed']['ratio']:.2f}x",
                drop_text(trial["tuning"]),
                drop_text(trial["evaluation"]),
                ", ".join(trial["misses"]),
            )
        )
    return rows


def drop_text(report: Mapping[str, Any] | None) -> str:
    """The drop of a gate's report in its JSON form, with its interval."""
    if report is None or report["drop"] is None:
        return "-"
    if report["ci95_low"] is None:
        return f"{report['drop']:+.4f}"
    return f"{report['drop']:+.4f} ({report['ci95_low']:+.4f} to {report['ci95_high']:+.4f})"


def _evaluated(trial: Trial) -> GateReport:
    assert trial.evaluation is not None  # noqa: S101 - only judged ones are asked for
    return trial.evaluation


def _worst_miss(trial: Trial, goal: SearchGoal) -> float:
    report = _evaluated(trial)
    if report.drop != report.drop:  # NaN
        return float("inf")
    return max(misses(trial, goal, report).values(), default=0.0)


def _missed_text(best: Trial, goal: SearchGoal) -> list[str]:
    missed, lines = misses(best, goal, _evaluated(best)), []
    if "size" in missed:
        wanted = goal.size_at_most_bytes or 0
        lines.append(f"size: {human_bytes(best.size_bytes)}, {best.size_bytes / wanted:.2f} times the bound")
    if "speed" in missed:
        lines.append(f"speed: {best.speed.ratio:.2f} times FP32's, not {goal.speed_at_least:g}")
    if "drop" in missed:
        lines.append(f"accuracy: {_evaluated(best).reason}")
    return lines


def _blame(best: Trial, artifacts: Sequence[Artifact], yardstick: Yardstick) -> tuple[Blame, ...]:
    """The drop after each step, less that before it, all on the tuning data."""
    lines, before = [], 0.0
    for spec, artifact in zip(best.specs, artifacts, strict=True):
        drop = yardstick.judge(artifact, max_drop=None).drop
        step = artifact.steps[-1]
        lines.append(
            Blame(
                step=text_from_spec(spec),
                bytes_before=step.bytes_before,
                bytes_after=step.bytes_after,
                drop=drop - before,
            )
        )
        before = drop
    return tuple(lines)


def _next_steps(
    trials: Sequence[Trial], best: Trial, goal: SearchGoal, material: Material, facts: Facts, ended: str
) -> list[str]:
    """What to change, the surest first; each bound that would do is one that a candidate here kept."""
    steps = []
    if ended != "complete":
        more = "the same search again goes on from here" if ended == "interrupted" else f"go on: {ended}"
        steps.append(more)
    if not facts.trained_on:
        steps.append(
            f"training data (--training), so that what is removed can be won back: {facts.untrained}"
        )
    elif facts.trained_on == "calibration":
        steps.append("training data (--training): so far only the calibration data's inputs were trained on")
    elif _trained(best):
        steps.append(f"more training: --epochs {2 * facts.epochs} instead of {facts.epochs}")
    if material.calibration is None:
        steps.append("calibration data (--calibration), for static INT8")
    steps += _bounds_that_would_do(trials, goal)
    if not _has_many(material):
        steps.append("more tuning data: with so few samples a drop is a coarse number")
    return steps


def _bounds_that_would_do(trials: Sequence[Trial], goal: SearchGoal) -> list[str]:
    fp32, steps = trials[0], []
    candidates = [trial for trial in trials if trial.specs]
    inside = [t for t in candidates if is_within(t.evaluation or t.tuning, goal.max_drop)]
    if goal.size_at_most_bytes is not None and inside:
        small = min(inside, key=lambda trial: trial.size_bytes)
        if small.size_bytes > goal.size_at_most_bytes:
            steps.append(
                f"--size-at-most {small.size_bytes} ({fp32.size_bytes / small.size_bytes:.1f}x smaller), "
                f"which {small.name} keeps inside the budget"
            )
    if goal.speed_at_least is not None and inside:
        fast = max(inside, key=lambda trial: trial.speed.ratio)
        if fast.speed.ratio < goal.speed_at_least:
            steps.append(
                f"--speed-at-least {fast.speed.ratio:.2f}, which {fast.name} keeps inside the budget"
            )
    enough = [trial for trial in candidates if not set(misses(trial, goal, trial.tuning)) - {"drop"}]
    if enough:
        true = min(enough, key=lambda trial: trial.drop)
        worst = max(true.drop, true.evaluation.drop if true.evaluation is not None else true.drop)
        if worst > goal.max_drop:
            steps.append(f"--max-drop {worst:.4g}, if that loss is bearable: {true.name} keeps the rest")
    return steps


def _has_many(material: Material) -> bool:
    return material.tuning is None or material.tuning.count >= 200


def _trained(trial: Trial) -> bool:
    return any(isinstance(spec, Trained) and spec.epochs for spec in trial.specs)
