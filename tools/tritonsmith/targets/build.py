"""What a further target is served from: judged beside the default's, and compiled where that can be.

TensorRT gets the model of the chain as it was before its numbers were narrowed, narrowed in TensorRT's own
way: FP16 and BF16 by casts, INT8 by its dialect of QuantizeLinear. ONNX Runtime computes these files on the
CPU, in the same way for every precision, so the gate is the one that the default passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tritonclient.grpc import model_config_pb2

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json, Target
from tritonsmith.candidates import EXACT, Candidate, Goal, judge_candidates, refusal_of
from tritonsmith.compress import steps
from tritonsmith.compress.chain import Material, run_chain
from tritonsmith.compress.steps import StepSpec
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.errors import CompressionError, EngineError
from tritonsmith.files import write_text_atomically
from tritonsmith.repository.config import served_precision
from tritonsmith.targets.check import split_chain
from tritonsmith.targets.config import config_for_target, with_plans
from tritonsmith.targets.order import FLOATING, PlanCandidate, PlanOrder
from tritonsmith.targets.order_file import json_from_facts, order_name, signed, text_from_order
from tritonsmith.targets.request import TargetRequest
from tritonsmith.targets.shape_nodes import copy_with_whole_shapes

if TYPE_CHECKING:
    from tritonsmith.targets.choose import ChosenPlan

Say = Callable[[str], None]

UNJUDGED = "not judged: there is no evaluation data"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSource:
    """What every target of a build is made from."""

    fp32: Artifact
    specs: tuple[StepSpec, ...]  # of the chain, named or found; () without one
    material: Material
    goal: Goal  # the default's
    chosen: Candidate  # what the default serves
    store: Path  # of compression steps
    plan_cache: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltTarget:
    """A target, ready to be published beside the default."""

    record: Target
    config: model_config_pb2.ModelConfig
    files: Mapping[str, Path]  # by their names in the version's folder


def build_targets(
    requests: Sequence[TargetRequest],
    source: TargetSource,
    default: model_config_pb2.ModelConfig,
    options: Mapping[str, PlanOptions],
    compiled: frozenset[str],
    folder: Path,
    *,
    say: Say = lambda _: None,
) -> tuple[BuiltTarget, ...]:
    """Build every target, each in a folder of its own below `folder`.

    `default` is the default's configuration, `options` are the plan options by target, complete
    (check.plan_options_of), and `compiled` names the targets whose plans are built here and now.

    Raises: as `build_target`.
    """
    built = []
    for request in requests:
        own = folder / f"target-{request.name}"
        own.mkdir()
        plan, here = options[request.name], request.name in compiled
        built.append(build_target(request, source, own, default=default, plan=plan, compiled=here, say=say))
    return tuple(built)


def build_target(
    request: TargetRequest,
    source: TargetSource,
    folder: Path,
    *,
    default: model_config_pb2.ModelConfig,
    plan: PlanOptions,
    compiled: bool,
    say: Say = lambda _: None,
) -> BuiltTarget:
    """Make what `request` serves, in `folder`; `compiled`: its plan too, on this machine.

    Raises:
        GateRefused: nothing that was asked for passes; nothing is to be published.
        CompressionError, SamplesError: what was asked for cannot be made of this model.
        PlanError: no plan could be built, or none is good enough.
    """
    config = config_for_target(default, request, inputs=source.fp32.inputs, plan=plan)
    if request.backend != "tensorrt":
        return _build_served(request, source, config, folder, say)
    goal = replace(
        source.goal,
        precision=request.precision,
        engine="onnxruntime",
        inference_precision=EXACT,
        max_batch_size=config.max_batch_size,
    )
    candidates = _select(_plan_candidates(request, source, goal, folder, say), goal)
    passing = [candidate for candidate in candidates if candidate.chosen]
    names = {candidate.name: f"{request.name}.{candidate.precision}.onnx" for candidate in passing}
    files: dict[str, Path] = {}
    for candidate in passing:
        assert candidate.artifact is not None  # noqa: S101 - only what was made passes
        copy = copy_with_whole_shapes(candidate.artifact.path, folder / names[candidate.name])
        files |= {file.name: file for file in onnx_model.model_files(copy)}
    order = _order(request, source, passing, names, folder, config.max_batch_size, plan)
    files[order_name(request.name)] = folder / order_name(request.name)
    write_text_atomically(folder / order_name(request.name), text_from_order(order))
    record = Target(
        name=request.name,
        backend=request.backend,
        precision=None,
        files=tuple(files),
        order=order_name(request.name),
        candidates=tuple(_json(candidate, names.get(candidate.name)) for candidate in candidates),
    )
    built = BuiltTarget(record=record, config=config, files=files)
    return _with_plan(built, order, folder, source.plan_cache, say) if compiled else built


def _plan_candidates(
    request: TargetRequest, source: TargetSource, goal: Goal, folder: Path, say: Say
) -> list[Candidate]:
    """What TensorRT could be given, judged against the FP32 model that the chain began with."""
    floating, narrowing = split_chain(source.specs, request)
    made = [_candidate("fp32", source.fp32)]
    # Without a chain the model that is judged against is the FP32 candidate itself.
    first = 1 if floating else 0
    for precision in _wanted(request, goal):
        if precision == "fp32" and not floating:
            continue
        say(f"making {precision} for the target {request.name}")
        try:
            specs = (*floating, *_narrow(precision, narrowing))
            artifacts = run_chain(specs, source.material, store=source.store, say=say)
            made.append(_candidate(precision, artifacts[-1] if artifacts else source.fp32))
        except (CompressionError, EngineError) as error:
            if precision == request.precision:
                raise
            made.append(Candidate(name=precision, precision=precision, refusal=error.reason))
    # A candidate that ONNX Runtime cannot run is out, and says so, under every wish.
    judged = judge_candidates(made, replace(goal, precision="auto"), timed=False, say=say)
    return judged[first:] if "fp32" in _wanted(request, goal) else judged[1:]


def _wanted(request: TargetRequest, goal: Goal) -> tuple[str, ...]:
    """What is made: FP32 also where narrower ones are, to stand in for them where they lose too much."""
    if request.precision == "auto":
        if goal.evaluation is None:
            return ("fp32",)
        return ("fp32", "fp16", "int8") if goal.calibration is not None else ("fp32", "fp16")
    return ("fp32", "fp16", "int8") if request.precision == "int8" else (request.precision,)


def _narrow(precision: str, quantize: steps.Quantize | None) -> tuple[StepSpec, ...]:
    if precision == "int8":
        return (replace(quantize or steps.Quantize(), method="static", dialect="tensorrt"),)
    return () if precision == "fp32" else (steps.Cast(to=precision),)


def _candidate(name: str, artifact: Artifact) -> Candidate:
    return Candidate(
        name=name,
        precision=artifact.precision,
        artifact=artifact,
        source=artifact,
        size_bytes=onnx_model.model_bytes(artifact.path),
    )


def _select(candidates: list[Candidate], goal: Goal) -> list[Candidate]:
    """The same candidates, those to be compiled marked as chosen, the others with the reason why not.

    Raises:
        GateRefused: none passes, or the precision asked for does not.
    """
    if goal.evaluation is None:
        candidates = [
            replace(candidate, notes=(*candidate.notes, UNJUDGED)) if candidate.artifact else candidate
            for candidate in candidates
        ]
    passing = {candidate.name: candidate for candidate in candidates if candidate.refusal is None}
    asked = next((candidate for candidate in candidates if candidate.name == goal.precision), None)
    if asked is not None and asked.refusal is not None:
        raise refusal_of(asked, goal)
    if not passing:
        raise refusal_of(candidates[0], goal)
    yardstick = next(name for name in FLOATING if name in passing)
    kept = {yardstick, "int8"} if goal.precision in ("auto", "int8") else {goal.precision}
    selected = []
    for candidate in candidates:
        if candidate.name in passing and candidate.name in kept:
            selected.append(replace(candidate, chosen=True))
        else:
            reason = candidate.refusal or f"{yardstick} passes, and is compiled instead"
            selected.append(replace(candidate, refusal=reason))
    return selected


def _order(
    request: TargetRequest,
    source: TargetSource,
    passing: list[Candidate],
    names: Mapping[str, str],
    folder: Path,
    max_batch_size: int,
    plan: PlanOptions,
) -> PlanOrder:
    candidates = tuple(
        PlanCandidate(
            file=names[candidate.name],
            sha256=onnx_model.model_sha256(folder / names[candidate.name]),
            precision=candidate.precision,
        )
        for candidate in passing
    )
    order = PlanOrder(
        target=request.name,
        candidates=candidates,
        inputs=source.fp32.inputs,
        outputs=source.fp32.outputs,
        max_batch_size=max_batch_size,
        plan=plan,
        precision=request.precision,
        allow_slow_int8=request.allow_slow_int8,
        fallback=candidates[0].file if request.without_plan == "fallback" else None,
        fingerprint="",
    )
    return signed(order)


def _with_plan(built: BuiltTarget, order: PlanOrder, folder: Path, cache: Path, say: Say) -> BuiltTarget:
    """The target with its plan for the GPU of this machine, from the cache or built into it."""
    from tritonsmith.targets.choose import choose_plan, tensorrt_tools
    from tritonsmith.targets.placing import plan_name
    from tritonsmith.targets.plan_cache import plan_from_cache

    tools = tensorrt_tools()
    device = tools.device()

    def build(out: Path, timing: Path) -> ChosenPlan:
        return choose_plan(order, folder, out, tools=tools, timing_cache=timing, say=say)

    found = plan_from_cache(cache, order, tensorrt=tools.version(), device=device, build=build, say=say)
    name = plan_name(order.target, device)
    facts = replace(found.facts, file=name)
    record = replace(
        built.record,
        precision=facts.precision,
        files=(*built.record.files, name),
        plans=(json_from_facts(facts),),
    )
    config = with_plans(built.config, {device.compute_capability: name}, newest=name)
    return BuiltTarget(record=record, config=config, files={**built.files, name: found.path})


def _build_served(
    request: TargetRequest,
    source: TargetSource,
    config: model_config_pb2.ModelConfig,
    folder: Path,
    say: Say,
) -> BuiltTarget:
    """The model that the default serves, in the format of another engine, judged on that engine."""
    chosen = source.chosen
    assert chosen.artifact is not None  # noqa: S101 - only what was made is chosen
    assert chosen.source is not None  # noqa: S101
    precision = served_precision(request.backend, config)
    goal = replace(
        source.goal,
        precision="served",
        engine=request.backend,
        inference_precision=precision,
        max_batch_size=config.max_batch_size,
    )
    written = _in_format(chosen.source, request.backend, folder, say)
    if chosen.artifact.format == written.format:
        files: dict[str, Path] = {}  # the default's own
    else:
        files = {file.name: file for file in _files_of(written)}
    judged = chosen
    if (request.backend, precision) != (source.goal.engine, source.goal.inference_precision):
        size_bytes = sum(file.stat().st_size for file in _files_of(written))
        served = Candidate(
            name=chosen.name, precision=written.precision, artifact=written, size_bytes=size_bytes
        )
        pair = [_candidate("fp32", source.fp32), served]
        judged = judge_candidates(pair, goal, timed=False, say=say)[-1]
    if judged.refusal is not None:
        raise refusal_of(judged, goal)
    record = Target(
        name=request.name,
        backend=request.backend,
        precision=written.precision,
        files=tuple(files),
        candidates=(_json(replace(judged, chosen=True), next(iter(files), None)),),
    )
    return BuiltTarget(record=record, config=config, files=files)


def _in_format(onnx: Artifact, backend: str, folder: Path, say: Say) -> Artifact:
    if backend == "openvino":
        from tritonsmith.engines.openvino_ir import save_openvino

        return save_openvino(onnx, folder / "model.xml", say=say)
    return replace(onnx, path=onnx_model.copy_renamed(onnx.path, folder / "model.onnx"))


def _files_of(artifact: Artifact) -> tuple[Path, ...]:
    if artifact.format == "openvino":
        return artifact.path, artifact.path.with_suffix(".bin")
    return onnx_model.model_files(artifact.path)


def _json(candidate: Candidate, file: str | None) -> dict[str, Json]:
    lineage = () if candidate.artifact is None else candidate.artifact.steps
    return {
        **candidate.json(),
        "file": file,
        "steps": [{"name": step.name, "measured": dict(step.measured)} for step in lineage],
    }
