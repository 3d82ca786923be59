"""A search over chains of steps for the model that keeps a drop, a size and a speed.

Choices are made on tuning data; the evaluation data judge the few that were chosen, best first, and their
number is reported. Every model and every measurement is kept by content, so a search that was killed goes on,
and one with a wider budget begins with what an earlier one made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material, check_roles, run_chain
from tritonsmith.compress.search.explore import explore
from tritonsmith.compress.search.goal import Progress, SearchGoal, Skipped, check_goal, misses, ordered
from tritonsmith.compress.search.outcome import SearchResult, conclude
from tritonsmith.compress.search.space import facts_of
from tritonsmith.compress.search.trial import Trial, Yardstick, name_of
from tritonsmith.compress.search.tuning import with_tuning
from tritonsmith.compress.steps import StepSpec
from tritonsmith.console import human_bytes
from tritonsmith.errors import CompressionError, EngineError, MissingExtraError, SamplesError, UsageError
from tritonsmith.samples import Samples

Say = Callable[[str], None]
Show = Callable[[Progress], None]
FINALISTS = 5  # candidates that the evaluation data judge at most: each look makes the next less honest
REFUSALS = (CompressionError, EngineError, MissingExtraError, SamplesError)


def search(
    teacher: Artifact,
    goal: SearchGoal,
    material: Material,
    evaluation: Samples,
    *,
    store: Path,
    say: Say = lambda _: None,
    show: Show = lambda _: None,
) -> SearchResult:
    """Look for the chain that keeps all bounds of `goal`, and say what is nearest where none does.

    Without tuning data a fifth of the training (else calibration) data is held back for them. Ctrl-C ends
    the looking, not the search: what was found by then is judged and returned.

    Raises:
        UsageError: no metric, or bounds that make no sense.
        SamplesError: nothing to choose on, or data that two roles share.
        EngineError: the FP32 model itself cannot be run.
    """
    check_goal(goal)
    if material.metric is None:
        raise UsageError("a search needs a metric", fix="give --metric, for instance accuracy or cosine")
    check_roles(material, evaluation)
    material = with_tuning(replace(material, max_drop=goal.max_drop), material.metric, say=say)
    assert material.tuning is not None  # noqa: S101 - with_tuning sees to it
    assert material.metric is not None  # noqa: S101 - refused above
    facts = facts_of(teacher, material, epochs=goal.epochs)
    yardstick = Yardstick(
        teacher,
        material.tuning,
        material.metric,
        engine=material.engine,
        store=store,
        batch_size=goal.batch_size,
    )
    say(f"searching for {goal.text()}")
    run = Run(goal=goal, material=material, yardstick=yardstick, store=store, say=say, show=show)
    ended = "complete"
    try:
        explore(run, facts)
    except Enough as reason:
        ended = str(reason)
    except KeyboardInterrupt:
        ended = "interrupted"
        say("interrupted: judging what was found so far (Ctrl-C again gives up)")
    judged = judge_finalists(run, evaluation)
    return conclude(
        run.trials, judged, run.skipped, goal, material, facts, yardstick, ended=ended, store=store
    )


class Enough(Exception):  # noqa: N818 - an end, not a fault
    """The budget of time or candidates is used up."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A search in progress: what was tried, and how to try one more."""

    goal: SearchGoal
    material: Material
    yardstick: Yardstick
    store: Path
    say: Say
    show: Show
    trials: list[Trial] = field(default_factory=list)  # FP32 first
    skipped: list[Skipped] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    _number: int = 0

    def __post_init__(self) -> None:
        self.say("measuring the FP32 model")
        self.trials.append(self.yardstick.measure((), self.yardstick.teacher))

    def consider(self, *specs: StepSpec) -> Trial | None:
        """Make and measure a chain; None where it cannot be made, with the reason kept.

        Raises:
            Enough: the budget of time or candidates is used up.
        """
        name = name_of(specs)
        known = next((trial for trial in self.trials if trial.specs == specs), None)
        if known is not None or any(skip.name == name for skip in self.skipped):
            return known
        self._check_budget(name)
        self._number += 1
        self.say(f"candidate {self._number} of at most {self.goal.max_candidates}: {name}")
        self._show(name, "making")
        try:
            artifact = run_chain(specs, self.material, store=self.store, say=self.say)[-1]
            trial = self.yardstick.measure(specs, artifact)
        except REFUSALS as error:
            self._refuse(name, error.reason)
            return None
        if trial.drop != trial.drop:  # NaN
            self._refuse(name, trial.tuning.reason)
            return None
        self.trials.append(trial)
        self.say(f"  {self.text_of(trial)}; {self._best_text()}")
        self._show(name, "measured")
        return trial

    def skip(self, name: str, reason: str) -> None:
        """Leave a candidate, or a kind of them, out for a reason."""
        self.skipped.append(Skipped(name=name, reason=reason))
        self.say(f"left out: {name}: {reason}")
        self._show(name, "skipped")

    def met(self) -> bool:
        """Whether a bounded search has a candidate that keeps all bounds on the tuning data."""
        return self.goal.bounded and not misses(self.best, self.goal, self.best.tuning)

    @property
    def best(self) -> Trial:
        return ordered(self.trials, self.trials[0], self.goal)[0]

    def text_of(self, trial: Trial) -> str:
        smaller = self.trials[0].size_bytes / trial.size_bytes
        return (
            f"{human_bytes(trial.size_bytes)} ({smaller:.1f}x smaller), {trial.speed.ratio:.2f}x as fast, "
            f"{trial.tuning.metric} {trial.tuning.candidate:.4f} (drop {trial.drop:+.4f})"
        )

    def _best_text(self) -> str:
        best = self.best
        state = "passes" if not misses(best, self.goal, best.tuning) else "nearest"
        return f"best so far ({state}): {best.name}"

    def _refuse(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name=name, reason=reason, failed=True))
        self.say(f"  cannot be had: {reason}")
        self._show(name, "failed")

    def _check_budget(self, name: str) -> None:
        if self._number >= self.goal.max_candidates:
            raise Enough(f"the {self.goal.max_candidates} candidates allowed are used up, before {name}")
        if self.goal.budget_s is not None and time.monotonic() - self.began_s >= self.goal.budget_s:
            raise Enough(f"the {self.goal.budget_s:g} seconds allowed are used up, before {name}")

    def _show(self, candidate: str, state: str) -> None:
        best = self.best
        self.show(
            Progress(
                number=self._number,
                at_most=self.goal.max_candidates,
                candidate=candidate,
                state=state,
                trials=tuple(self.trials),
                best=best,
                passes=not misses(best, self.goal, best.tuning),
                elapsed_s=time.monotonic() - self.began_s,
            )
        )

    def show_judging(self, trial: Trial) -> None:
        self.say(f"judging {trial.name} on the evaluation data")
        self._show(trial.name, "judging")


def judge_finalists(run: Run, evaluation: Samples) -> list[Trial]:
    """The candidates that the evaluation data judged, in that order: until one keeps all bounds.

    Where no candidate keeps all bounds on the tuning data, the one that misses least is judged alone.
    """
    goal, metric = run.goal, run.yardstick.metric
    gauge = Yardstick(
        run.yardstick.teacher,
        evaluation,
        metric,
        engine=run.material.engine,
        store=run.store,
        batch_size=goal.batch_size,
    )
    ranked = ordered(run.trials, run.trials[0], goal)
    passing = [trial for trial in ranked if not misses(trial, goal, trial.tuning)]
    judged: list[Trial] = []
    for trial in passing[:FINALISTS] or ranked[:1]:
        run.show_judging(trial)
        report = gauge.judge(trial.artifact, max_drop=goal.max_drop)
        judged.append(replace(trial, evaluation=report))
        run.say(f"  {report.reason}")
        if not misses(trial, goal, report):
            break
    return judged
