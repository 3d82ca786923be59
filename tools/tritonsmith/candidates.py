"""The models that a build can choose from: made, judged on the engine that will serve them, and chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.errors import CompressionError, EngineError, GateRefused, SamplesError, UsageError
from tritonsmith.gate import GateReport, judge, predict
from tritonsmith.measure import SpeedRatio, compare_speed
from tritonsmith.metrics import Metric
from tritonsmith.samples import Samples

Say = Callable[[str], None]

EXACT = "f32"
BATCHES = (1, 2, 3)  # and the largest that is served


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What candidates are made and judged for."""

    precision: str  # "fp32", "fp16", "int8", "auto", or "chain" where steps are asked for
    engine: str
    max_batch_size: int  # 0: no batch axis
    inference_precision: str | None  # what OpenVINO serves floats in; None: its own choice
    calibration: Samples | None
    evaluation: Samples | None
    metric: Metric | None
    max_drop: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model that could be published; `refusal` says why it is not."""

    name: str  # "fp32", "fp16", "int8-static", "int8-dynamic"
    precision: str
    artifact: Artifact | None = None  # None: it could not be made
    source: Artifact | None = None  # the ONNX model that `artifact` was written from, or is
    size_bytes: int | None = None
    gate: GateReport | None = None
    speed: SpeedRatio | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()
    chosen: bool = False

    def json(self) -> dict[str, Json]:
        audit = self.audit()
        return {
            "name": self.name,
            "precision": self.precision,
            "bytes": self.size_bytes,
            "gate": None if self.gate is None else self.gate.json(),
            "speed": None if self.speed is None else self.speed.json(),
            "int8_ops": audit.get("int8_ops"),
            "ops": audit.get("ops"),
            "chosen": self.chosen,
            "refusal": self.refusal,
            "notes": list(self.notes),
        }

    def audit(self) -> dict[str, Json]:
        """What the quantizing step measured of the engine, or nothing."""
        steps = self.artifact.steps if self.artifact is not None else ()
        return next((dict(step.measured) for step in reversed(steps) if "int8_ops" in step.measured), {})


def make_candidates(fp32: Artifact, goal: Goal, folder: Path, *, say: Say) -> list[Candidate]:
    """The FP32 model and those that `goal.precision` asks for, each in a folder of its own.

    Under "auto" one that cannot be made is listed with the reason; asked for by name, it is an error.

    Raises:
        CompressionError: the precision asked for cannot be reached with this model.
        SamplesError: calibration data that is refused.
    """
    wanted = {"fp32": (), "auto": ("fp16", "int8")}.get(goal.precision, (goal.precision,))
    candidates = [_served(Candidate(name="fp32", precision="fp32"), fp32, goal, folder, say)]
    if wanted and fp32.precision != "fp32":
        raise CompressionError(
            f"the source is {fp32.precision} already, and cannot be made {goal.precision}",
            fix="build from the FP32 model, or with --precision fp32, which keeps what the source has",
        )
    for precision in wanted:
        name = precision if precision == "fp16" else f"int8-{_int8_method(fp32, goal)}"
        candidate = Candidate(name=name, precision=precision)
        target = folder / name
        target.mkdir()
        if name == "int8-static" and goal.calibration is None and goal.precision == "auto":
            refusal = "no calibration data: give it with --calibration"
            candidates.append(replace(candidate, refusal=refusal))
            continue
        say(f"making {name}")
        try:
            candidates.append(_made(candidate, fp32, goal, target, say))
        except (CompressionError, EngineError) as error:
            if goal.precision != "auto":
                raise
            candidates.append(replace(candidate, refusal=error.reason))
    return candidates


def chain_candidates(artifacts: Sequence[Artifact], goal: Goal, folder: Path, *, say: Say) -> list[Candidate]:
    """The FP32 model and the artifact after each step of a chain, each in a folder of its own."""
    fp32 = artifacts[0]
    candidates = [_served(Candidate(name="fp32", precision=fp32.precision), fp32, goal, folder, say)]
    for number, artifact in enumerate(artifacts[1:], 1):
        target = folder / f"step-{number}"
        target.mkdir()
        own = replace(artifact, path=onnx_model.copy_model(artifact.path, target / "model.onnx"))
        name = f"{number} {artifact.steps[-1].name}"
        candidates.append(_served(Candidate(name=name, precision=artifact.precision), own, goal, target, say))
    return candidates


def judge_candidates(
    candidates: list[Candidate], goal: Goal, *, timed: bool = True, say: Say
) -> list[Candidate]:
    """Each with its gate report and, other than FP32 and where `timed`, its speed beside FP32."""
    if goal.evaluation is None:
        return candidates
    baseline = candidates[0]
    expected = _outputs(baseline, goal, EXACT)
    judged = []
    for candidate in candidates:
        if candidate.artifact is None:
            judged.append(candidate)
            continue
        candidate = _noted_if_larger(candidate, baseline)
        exact = candidate is baseline and goal.inference_precision == EXACT
        try:
            outputs = expected if exact else _outputs(candidate, goal, goal.inference_precision)
        except EngineError as error:
            if goal.precision != "auto" or candidate is baseline:
                raise
            judged.append(replace(candidate, refusal=error.reason))
            continue
        if goal.metric is not None:
            say(f"judging {candidate.name} by {goal.metric.text}")
            gate = judge(
                goal.metric,
                baseline=expected,
                candidate=outputs,
                target=goal.evaluation.target,
                max_drop=goal.max_drop,
                say=say,
            )
            candidate = replace(candidate, gate=gate, refusal=None if gate.passed else gate.reason)
        if timed and candidate.name != "fp32":
            candidate = _timed(candidate, baseline, goal, say)
        judged.append(candidate)
    return judged


def choose(candidates: list[Candidate], goal: Goal) -> list[Candidate]:
    """The same candidates, one of them chosen, the others with the reason why not.

    Under "auto" a candidate that is slower than FP32 is out, and of those left the largest product of
    speed and size gains wins.

    Raises:
        GateRefused: the candidate asked for does not pass.
    """
    if goal.precision != "auto":
        best = candidates[-1]
        if best.refusal is not None:
            raise refusal_of(best, goal)
    else:
        candidates = [_out_if_slower(candidate) for candidate in candidates]
        passing = [candidate for candidate in candidates if candidate.refusal is None]
        if not passing:
            raise refusal_of(candidates[0], goal)
        best = max(passing, key=lambda candidate: _merit(candidate, candidates[0]))
    return [
        replace(candidate, chosen=True)
        if candidate is best
        else replace(candidate, refusal=candidate.refusal or _lost(candidate, best, goal))
        for candidate in candidates
    ]


def refusal_of(candidate: Candidate, goal: Goal) -> GateRefused:
    """The error that says what the gate saw of a candidate, and what to do."""
    return GateRefused(*_refusal(candidate), fix=_next_step(candidate, goal))


def _int8_method(fp32: Artifact, goal: Goal) -> str:
    from tritonsmith.compress.int8.quantize import default_int8_method

    method = default_int8_method(fp32, goal.engine)
    if method == "static" and goal.calibration is None and goal.precision == "int8":
        raise UsageError(
            "static INT8 needs calibration data, and none is made up",
            expected="--calibration X.npz: some hundreds of samples like those that the model will see",
            fix="take them from the training data, apart from the evaluation data",
        )
    return method


def _made(candidate: Candidate, fp32: Artifact, goal: Goal, folder: Path, say: Say) -> Candidate:
    from tritonsmith.compress.calibration import check_calibration
    from tritonsmith.compress.float16 import cast_float16
    from tritonsmith.compress.int8.quantize import quantize_dynamic, quantize_static

    out = folder / "model.onnx"
    if candidate.name == "fp16":
        if goal.engine == "openvino":
            return _served(candidate, fp32, goal, folder, say, half=True)
        samples = goal.evaluation or goal.calibration
        artifact = cast_float16(fp32, out, samples=samples, say=say)
        note = "ONNX Runtime's CPU computes FP16 in FP32: smaller, not faster, and a GPU may be less exact"
        candidate = replace(candidate, notes=(note,))
    elif candidate.name == "int8-static":
        assert goal.calibration is not None  # noqa: S101 - refused before
        check_calibration(goal.calibration, goal.evaluation)
        artifact = quantize_static(fp32, goal.calibration, out, dialect=goal.engine, say=say)
    else:
        artifact = quantize_dynamic(fp32, out, engine=goal.engine, say=say)
    return _served(candidate, artifact, goal, folder, say)


def _served(
    candidate: Candidate, artifact: Artifact, goal: Goal, folder: Path, say: Say, *, half: bool = False
) -> Candidate:
    """The candidate in the format that the engine's backend serves, alone in its folder."""
    if goal.engine == "openvino":
        from tritonsmith.engines.openvino_ir import ir_bytes, save_openvino

        target = folder / "served"
        target.mkdir()
        served = save_openvino(artifact, target / "model.xml", half=half, say=say)
        return replace(candidate, artifact=served, source=artifact, size_bytes=ir_bytes(served.path))
    size_bytes = onnx_model.model_bytes(artifact.path)
    return replace(candidate, artifact=artifact, source=artifact, size_bytes=size_bytes)


def _outputs(candidate: Candidate, goal: Goal, precision: str | None) -> dict[str, NDArray[Any]]:
    from tritonsmith.engines import open_session

    assert candidate.artifact is not None  # noqa: S101 - asked for by its caller
    assert goal.evaluation is not None  # noqa: S101
    artifact = candidate.artifact
    session = open_session(artifact.path, engine=goal.engine, precision=precision)
    if artifact.batched:
        for size in _batches(goal):
            outputs = session.run(_rows(goal.evaluation, size))
            for name, array in outputs.items():
                if len(array) != size:
                    raise EngineError(
                        f"{candidate.name}: output {name!r} loses its batch axis",
                        found=f"shape {list(array.shape)} for a batch of {size}",
                    )
    return predict(session, goal.evaluation, batched=artifact.batched, batch_size=max(1, goal.max_batch_size))


def _batches(goal: Goal) -> Iterator[int]:
    yield from (size for size in BATCHES if size < goal.max_batch_size)
    yield max(1, goal.max_batch_size)


def _rows(samples: Samples, size: int) -> dict[str, NDArray[Any]]:
    """`size` samples, the first ones again where there are fewer."""
    return {
        name: array[[index % len(array) for index in range(size)]] for name, array in samples.arrays.items()
    }


def _timed(candidate: Candidate, baseline: Candidate, goal: Goal, say: Say) -> Candidate:
    from tritonsmith.engines import open_session
    from tritonsmith.measure import THREADS

    assert candidate.artifact is not None  # noqa: S101 - asked for by its caller
    assert baseline.artifact is not None  # noqa: S101
    assert goal.evaluation is not None  # noqa: S101
    say(f"timing {candidate.name} beside fp32")
    pair = [
        open_session(artifact.path, engine=goal.engine, threads=THREADS, precision=goal.inference_precision)
        for artifact in (baseline.artifact, candidate.artifact)
    ]
    arrays = goal.evaluation.arrays
    batched = candidate.artifact.batched
    inputs = {name: array[:1] if batched else array[0] for name, array in arrays.items()}
    speed = compare_speed(pair[0], pair[1], inputs, batch_size=1)
    say(f"{candidate.name} runs at {speed.ratio:.2f} times the speed of fp32")
    notes = candidate.notes
    if speed.slower:
        notes = (*notes, _slower_text(speed))
    return replace(candidate, speed=speed, notes=notes)


def _noted_if_larger(candidate: Candidate, baseline: Candidate) -> Candidate:
    """Quantization adds nodes; a model of a few kilobytes can grow by them."""
    if candidate is baseline or (candidate.size_bytes or 0) < (baseline.size_bytes or 0):
        return candidate
    note = f"no smaller than FP32: {candidate.size_bytes} bytes against {baseline.size_bytes}"
    return replace(candidate, notes=(*candidate.notes, note))


def _out_if_slower(candidate: Candidate) -> Candidate:
    if candidate.refusal is None and candidate.speed is not None and candidate.speed.slower:
        refusal = _slower_text(candidate.speed)
        notes = tuple(note for note in candidate.notes if note != refusal)
        return replace(candidate, refusal=refusal, notes=notes)
    return candidate


def _slower_text(speed: SpeedRatio) -> str:
    return f"slower than FP32 on this machine: {_speed_text(speed)}"


def _speed_text(speed: SpeedRatio) -> str:
    return f"{speed.ratio:.2f} times its speed ({speed.low:.2f} to {speed.high:.2f})"


def _merit(candidate: Candidate, fp32: Candidate) -> float:
    assert candidate.size_bytes is not None  # noqa: S101 - only candidates that were made pass
    assert fp32.size_bytes is not None  # noqa: S101
    speed = candidate.speed.ratio if candidate.speed is not None else 1.0
    return speed * fp32.size_bytes / candidate.size_bytes


def _lost(candidate: Candidate, best: Candidate, goal: Goal) -> str:
    if goal.precision == "chain":
        return "a step on the way"
    if goal.precision != "auto":
        return f"{goal.precision} was asked for"
    return f"{best.name} gains more in speed times size"


def _refusal(candidate: Candidate) -> tuple[str]:
    gate = candidate.gate
    lines = [f"the accuracy gate refuses {candidate.name}; nothing was published"]
    if gate is not None:
        interval = (
            "" if gate.ci95_low is None else f", 95 % interval {gate.ci95_low:.4g} to {gate.ci95_high:.4g}"
        )
        lines.append(
            f"  best candidate: {candidate.name}, {candidate.size_bytes} bytes, {gate.metric} "
            f"{gate.baseline:.4f} -> {gate.candidate:.4f} on {gate.samples} samples{interval}"
        )
        lines.append(f"  reason: {gate.reason}")
    return ("\n".join(lines),)


def _next_step(candidate: Candidate, goal: Goal) -> str:
    steps = []
    if candidate.precision == "int8":
        steps.append("--precision auto, which keeps the best that passes, or --precision fp16")
    if candidate.name == "int8-static" and goal.calibration is not None:
        steps.append(f"more varied calibration data than these {goal.calibration.count} samples")
    if candidate.precision == "fp16":
        steps.append("--precision fp32")
    gate = candidate.gate
    if gate is not None and gate.drop == gate.drop:  # not NaN
        steps.append(f"a budget of --max-drop {gate.drop:.4g} or more, if that loss is bearable")
    return "; or ".join(steps) or "look at the source: the converted model itself gives no usable numbers"


def check_labels(evaluation: Samples, metric: Metric) -> None:
    """Raise SamplesError where the metric needs labels and there are none."""
    if metric.needs_target and evaluation.target is None:
        raise SamplesError(
            f"{evaluation.path} has no labels, and {metric.text} needs them",
            expected="an array named 'target'",
            fix="or compare with the FP32 model: --metric cosine or max-abs-error",
        )
