"""What a GPU machine does with an order: compile every candidate, hold each against its ONNX file, choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.artifact import Json, TensorSpec, sha256_of
from tritonsmith.engines import Session, open_session
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.errors import EngineError
from tritonsmith.files import staging_folder
from tritonsmith.ingest.seeds import draw_inputs, index_ranges
from tritonsmith.measure import ratio_from_times, time_rounds
from tritonsmith.targets.agreement import (
    Agreement,
    Arrays,
    Case,
    Difference,
    cases_of,
    compare,
    tolerance_of,
)
from tritonsmith.targets.order import PlanCandidate, PlanOrder
from tritonsmith.targets.trial import Timing, Trial, decide, speed_text, yardstick_of

Say = Callable[[str], None]

# ONNX Runtime's CPU has few kernels for these; their files are then held against the first candidate's.
SPARSELY_RUN = ("bf16", "fp8", "int4")


class Compile(Protocol):
    def __call__(
        self,
        onnx: Path,
        out: Path,
        *,
        inputs: tuple[TensorSpec, ...],
        options: PlanOptions,
        precision: str,
        timing_cache: Path | None,  # a folder
        say: Say,
    ) -> PlanFacts: ...


class Open(Protocol):
    def __call__(self, plan: Path, *, profile: int, onnx: Path) -> AbstractContextManager[Session]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTools:
    """What stands between an order and a GPU; `tensorrt_tools` has the real ones."""

    why_unavailable: Callable[[], str | None]  # None: plans can be built here
    version: Callable[[], str]  # TensorRT's
    device: Callable[[], Device]
    compile: Compile
    open: Open
    refit: Callable[[Path, Path, Path], None]  # a plan without weights, its ONNX file, the plan to write
    time: Callable[[Sequence[Session], Arrays], NDArray[Any]] = time_rounds  # seconds [rounds, sessions]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPlan:
    """The plan to serve, and what became of every candidate."""

    facts: PlanFacts
    candidates: tuple[Mapping[str, Json], ...]


def tensorrt_tools() -> PlanTools:
    """TensorRT and the first GPU of this machine; nothing of either is loaded before it is asked."""
    from tritonsmith.engines.tensorrt import builder, refit, session, versions

    def open_plan(plan: Path, *, profile: int, onnx: Path) -> AbstractContextManager[Session]:
        return session.open_plan(plan, profile=profile, onnx=onnx)

    return PlanTools(
        why_unavailable=versions.why_unavailable,
        version=lambda: str(versions.import_tensorrt().__version__),
        device=versions.device,
        compile=builder.build_plan,
        open=open_plan,
        refit=refit.refit_plan,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    order: PlanOrder
    folder: Path  # with the candidates
    stage: Path  # for their plans
    inputs: tuple[tuple[Case, Arrays], ...]
    tools: PlanTools
    say: Say


def choose_plan(
    order: PlanOrder,
    folder: Path,
    out: Path,
    *,
    tools: PlanTools,
    timing_cache: Path | None = None,
    say: Say = lambda _: None,
) -> ChosenPlan:
    """Compile the candidates in `folder` and write the chosen plan, with its weights, to `out`.

    Raises:
        PlanError: no candidate can be published; every reason is in the message. `out` is not written.
    """
    with staging_folder(out) as stage:
        inputs = draw_cases(order, folder)
        work = _Work(order=order, folder=folder, stage=stage, inputs=inputs, tools=tools, say=say)
        trials = [_compiled(candidate, work, timing_cache) for candidate in order.candidates]
        trials = [_compared(trial, work) for trial in trials]
        trials = decide(_timed(trials, work), order)
        chosen = next(trial for trial in trials if trial.chosen)
        say(f"chose {chosen.candidate.precision}")
        facts = _written(chosen, out, work)
    return ChosenPlan(facts=facts, candidates=tuple(trial.json() for trial in trials))


def draw_cases(order: PlanOrder, folder: Path) -> tuple[tuple[Case, Arrays], ...]:
    """Seeded inputs for every case of an order, inside the ranges that its first candidate's graph takes."""
    model = onnx_model.load_model(folder / order.candidates[0].file, with_weights=False)
    ranges = index_ranges(model, order.inputs)
    return tuple(
        (case, draw_inputs(order.inputs, case.axes, ranges, frozenset(ranges), seed))
        for seed, case in enumerate(cases_of(order))
    )


def _compiled(candidate: PlanCandidate, work: _Work, timing_cache: Path | None) -> Trial:
    work.say(f"compiling {candidate.file}")
    began_s = time.monotonic()
    plan = work.stage / f"{candidate.precision}.{candidate.sha256[:8]}.plan"
    try:
        facts = work.tools.compile(
            work.folder / candidate.file,
            plan,
            inputs=work.order.inputs,
            options=work.order.plan,
            precision=candidate.precision,
            timing_cache=timing_cache,
            say=work.say,
        )
    except EngineError as error:
        work.say(f"{candidate.file} cannot be compiled: {error.reason}")
        return Trial(candidate=candidate, refusal=error.reason)
    work.say(f"compiled {candidate.file} in {time.monotonic() - began_s:.1f} s")
    return Trial(candidate=candidate, plan=plan, facts=facts)


def _compared(trial: Trial, work: _Work) -> Trial:
    """Every output in every case beside what ONNX Runtime answers."""
    if trial.plan is None:
        return trial
    work.say(f"comparing the {trial.candidate.precision} plan with {trial.candidate.file}")
    order = work.order
    tolerance = tolerance_of(trial.candidate.precision, tf32=order.plan.tf32)
    differences: list[Difference] = []
    try:
        expected, reference, notes = _expected(trial.candidate, work)
        for (case, arrays), answer in zip(work.inputs, expected, strict=True):
            with _opened(trial, case, work) as session:
                found = session.run(arrays)
            batched = order.max_batch_size > 0
            differences += compare(case, order.outputs, found, answer, batched=batched, tolerance=tolerance)
    except EngineError as error:
        return replace(trial, refusal=error.reason)
    agreement = Agreement(differences=tuple(differences), reference=reference)
    if agreement.refusal is not None:
        work.say(f"{trial.candidate.precision} is refused: {agreement.refusal}")
    return replace(trial, agreement=agreement, refusal=agreement.refusal, notes=notes)


def _expected(
    candidate: PlanCandidate, work: _Work
) -> tuple[list[dict[str, NDArray[Any]]], str, tuple[str, ...]]:
    """What ONNX Runtime answers in each case, the file that it ran, and what is to be said of that."""
    try:
        session = open_session(work.folder / candidate.file)
        return [session.run(arrays) for _, arrays in work.inputs], candidate.file, ()
    except EngineError as error:
        first = work.order.candidates[0]
        if candidate.precision not in SPARSELY_RUN or first.file == candidate.file:
            raise
        session = open_session(work.folder / first.file)
        note = f"compared with {first.file}: {error.reason}"
        return [session.run(arrays) for _, arrays in work.inputs], first.file, (note,)


def _timed(trials: list[Trial], work: _Work) -> list[Trial]:
    """Each trial that ran, timed beside the yardstick, all in the same rounds."""
    yardstick = yardstick_of(trials)
    others = [trial for trial in trials if trial.agreement is not None and trial is not yardstick]
    if yardstick is None or not others:
        return trials
    beside = yardstick.candidate.precision
    timings: dict[str, list[Timing]] = {trial.candidate.file: [] for trial in others}
    for case, arrays in work.inputs:
        work.say(f"timing {len(others) + 1} plans at {case}")
        with ExitStack() as stack:
            sessions = [stack.enter_context(_opened(trial, case, work)) for trial in (yardstick, *others)]
            times_s = work.tools.time(sessions, arrays)
        for side, trial in enumerate(others, 1):
            speed = ratio_from_times(times_s[:, 0], times_s[:, side], case.batch_size)
            samples_s = tuple((float(first), float(second)) for first, second in times_s[:, [0, side]])
            timings[trial.candidate.file].append(Timing(case=case, speed=speed, samples_s=samples_s))
            work.say(f"{trial.candidate.precision} runs at {speed_text(speed)} of {beside}")
    return [
        replace(trial, timings=tuple(timings[trial.candidate.file]), yardstick=beside)
        if trial.candidate.file in timings
        else trial
        for trial in trials
    ]


def _opened(trial: Trial, case: Case, work: _Work) -> AbstractContextManager[Session]:
    assert trial.plan is not None  # noqa: S101 - asked for compiled ones alone
    onnx = work.folder / trial.candidate.file
    return work.tools.open(trial.plan, profile=case.profile, onnx=onnx)


def _written(chosen: Trial, out: Path, work: _Work) -> PlanFacts:
    """Put the chosen plan in place: Triton loads only plans that have their weights."""
    assert chosen.plan is not None  # noqa: S101 - a trial that passed has both
    assert chosen.facts is not None  # noqa: S101
    told = chosen.json()
    measured = {**chosen.facts.measured, "agreement": told["agreement"], "speed": told["speed"]}
    if not chosen.facts.stripped:
        chosen.plan.replace(out)
        return replace(chosen.facts, file=out.name, measured=measured)
    work.say("giving the chosen plan its weights")
    work.tools.refit(chosen.plan, work.folder / chosen.candidate.file, out)
    measured["stripped_bytes"] = chosen.facts.size_bytes
    return replace(
        chosen.facts,
        file=out.name,
        sha256=sha256_of(out),
        size_bytes=out.stat().st_size,
        stripped=False,
        measured=measured,
    )
