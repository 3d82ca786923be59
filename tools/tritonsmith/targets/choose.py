"""What a GPU machine does with an order: compile every candidate, hold each against its ONNX file, choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.artifact import Json, TensorSpec
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
from tritonsmith.targets.trial import Timing, Trial, decide, reason_of, speed_text, yardstick_of

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
        timing_cache: Path | None,
        say: Say,
    ) -> PlanFacts: ...


class Open(Protocol):
    def __call__(self, plan: Path, *, profile: int, onnx: Path) -> Session: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTools:
    """What stands between an order and a GPU; `tensorrt_tools` has the real ones."""

    why_unavailable: Callable[[], str | None]  # None: plans can be built here
    version: Callable[[], str]  # TensorRT's
    device: Callable[[], Device]
    compile: Compile
    open: Open
    time: Callable[[Sequence[Session], Arrays], NDArray[Any]] = time_rounds  # seconds [rounds, sessions]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPlan:
    """The plan to serve, and what became of every candidate."""

    facts: PlanFacts
    candidates: tuple[Mapping[str, Json], ...]


def tensorrt_tools() -> PlanTools:
    """TensorRT and the GPU of this machine; nothing of it is loaded before it is asked."""
    from tritonsmith.engines.tensorrt import builder, session, versions

    def open_plan(plan: Path, *, profile: int, onnx: Path) -> Session:
        return session.open_plan(plan, profile=profile, onnx=onnx)

    return PlanTools(
        why_unavailable=versions.why_unavailable,
        version=lambda: str(versions.import_tensorrt().__version__),
        device=versions.device,
        compile=builder.build_plan,
        open=open_plan,
    )


def choose_plan(
    order: PlanOrder,
    folder: Path,
    out: Path,
    *,
    tools: PlanTools,
    timing_cache: Path | None = None,
    say: Say = lambda _: None,
) -> ChosenPlan:
    """Compile the candidates in `folder` and write the chosen plan to `out`.

    Raises:
        PlanError: no candidate can be published; every reason is in the message. `out` is not written.
    """
    with staging_folder(out) as stage:
        trials = [
            _compiled(candidate, order, folder, stage, tools, timing_cache, say)
            for candidate in order.candidates
        ]
        inputs = draw_cases(order, folder)
        trials = [_compared(trial, order, folder, inputs, tools, say) for trial in trials]
        trials = _timed(trials, folder, inputs, tools, say)
        trials = decide(trials, order)
        chosen = next(trial for trial in trials if trial.chosen)
        assert chosen.plan is not None  # noqa: S101 - only a compiled one is chosen
        assert chosen.facts is not None  # noqa: S101
        chosen.plan.replace(out)
    measured = {
        **chosen.facts.measured,
        "agreement": chosen.json()["agreement"],
        "speed": chosen.json()["speed"],
    }
    facts = replace(chosen.facts, file=out.name, measured=measured)
    return ChosenPlan(facts=facts, candidates=tuple(trial.json() for trial in trials))


def draw_cases(order: PlanOrder, folder: Path) -> tuple[tuple[Case, Arrays], ...]:
    """Seeded inputs for every case of an order, inside the ranges that its first candidate's graph takes."""
    model = onnx_model.load_model(folder / order.candidates[0].file, with_weights=False)
    ranges = index_ranges(model, order.inputs)
    return tuple(
        (case, draw_inputs(order.inputs, case.axes, ranges, frozenset(ranges), seed))
        for seed, case in enumerate(cases_of(order))
    )


def _compiled(
    candidate: PlanCandidate,
    order: PlanOrder,
    folder: Path,
    stage: Path,
    tools: PlanTools,
    timing_cache: Path | None,
    say: Say,
) -> Trial:
    say(f"compiling {candidate.file}")
    began_s = time.monotonic()
    plan = stage / f"{candidate.precision}.{candidate.sha256[:8]}.plan"
    try:
        facts = tools.compile(
            folder / candidate.file,
            plan,
            inputs=order.inputs,
            options=order.plan,
            precision=candidate.precision,
            timing_cache=timing_cache,
            say=say,
        )
    except EngineError as error:
        say(f"{candidate.file} cannot be compiled")
        return Trial(candidate=candidate, refusal=reason_of(error))
    say(f"compiled {candidate.file} in {time.monotonic() - began_s:.1f} s")
    return Trial(candidate=candidate, plan=plan, facts=facts)


def _compared(
    trial: Trial,
    order: PlanOrder,
    folder: Path,
    inputs: Sequence[tuple[Case, Arrays]],
    tools: PlanTools,
    say: Say,
) -> Trial:
    if trial.plan is None:
        return trial
    say(f"comparing the {trial.candidate.precision} plan with {trial.candidate.file}")
    tolerance = tolerance_of(trial.candidate.precision, tf32=order.plan.tf32)
    batched = order.max_batch_size > 0
    differences: list[Difference] = []
    try:
        expected, reference, notes = _expected(trial.candidate, order, folder, inputs)
        for number in sorted({case.profile for case, _ in inputs}):
            session = tools.open(trial.plan, profile=number, onnx=folder / trial.candidate.file)
            for (case, arrays), answer in zip(inputs, expected, strict=True):
                if case.profile == number:
                    found = session.run(arrays)
                    differences += compare(
                        case, order.outputs, found, answer, batched=batched, tolerance=tolerance
                    )
    except EngineError as error:
        return replace(trial, refusal=reason_of(error))
    agreement = Agreement(differences=tuple(differences), reference=reference)
    return replace(trial, agreement=agreement, refusal=agreement.refusal, notes=notes)


def _expected(
    candidate: PlanCandidate, order: PlanOrder, folder: Path, inputs: Sequence[tuple[Case, Arrays]]
) -> tuple[list[dict[str, NDArray[Any]]], str, tuple[str, ...]]:
    """What ONNX Runtime answers in each case, the file that it ran, and what is to be said of that."""
    try:
        session = open_session(folder / candidate.file)
        return [session.run(arrays) for _, arrays in inputs], candidate.file, ()
    except EngineError as error:
        first = order.candidates[0]
        if candidate.precision not in SPARSELY_RUN or first.file == candidate.file:
            raise
        session = open_session(folder / first.file)
        note = f"compared with {first.file}: {reason_of(error)}"
        return [session.run(arrays) for _, arrays in inputs], first.file, (note,)


def _timed(
    trials: list[Trial], folder: Path, inputs: Sequence[tuple[Case, Arrays]], tools: PlanTools, say: Say
) -> list[Trial]:
    """Each compiled trial timed beside the yardstick, all in the same rounds."""
    yardstick = yardstick_of(trials)
    others = [trial for trial in trials if trial.plan is not None and trial is not yardstick]
    if yardstick is None or not others:
        return trials
    timings: dict[str, list[Timing]] = {trial.candidate.file: [] for trial in others}
    for case, arrays in inputs:
        say(f"timing {len(others) + 1} plans at {case}")
        sessions = []
        for trial in (yardstick, *others):
            assert trial.plan is not None  # noqa: S101 - compiled ones alone
            sessions.append(tools.open(trial.plan, profile=case.profile, onnx=folder / trial.candidate.file))
        times_s = tools.time(sessions, arrays)
        for side, trial in enumerate(others, 1):
            speed = ratio_from_times(times_s[:, 0], times_s[:, side], case.batch_size)
            samples_s = tuple((float(first), float(second)) for first, second in times_s[:, [0, side]])
            timings[trial.candidate.file].append(Timing(case=case, speed=speed, samples_s=samples_s))
            say(f"{trial.candidate.precision} runs at {speed_text(speed)} of {yardstick.candidate.precision}")
    return [
        replace(trial, timings=tuple(timings[trial.candidate.file]), yardstick=yardstick.candidate.precision)
        if trial in others
        else trial
        for trial in trials
    ]
