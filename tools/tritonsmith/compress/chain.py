"""A chain of steps from one FP32 artifact; results are kept by content, so that nothing is made twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import steps
from tritonsmith.compress.calibration import refuse_shared, row_hashes
from tritonsmith.compress.step_text import json_from_spec, text_from_spec
from tritonsmith.compress.steps import StepSpec
from tritonsmith.compress.store import keep_artifact
from tritonsmith.errors import CompressionError
from tritonsmith.ingest import convert, source_sha256
from tritonsmith.ingest.detect import detect_kind
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.metrics import Metric
from tritonsmith.samples import Samples

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What steps may draw on beside the artifact that they are given.

    Calibration and training data are what a model is fitted to, tuning data what choices are made on;
    evaluation data are not here, so that no step can see them.
    """

    teacher: Artifact  # the FP32 model that the chain began with
    engine: str = "onnxruntime"
    calibration: Samples | None = None
    training: Samples | None = None
    tuning: Samples | None = None
    metric: Metric | None = None
    max_drop: float | None = None
    source: str | None = None  # what `convert` made the teacher of
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    ranges: Path | None = None  # folder in which one calibration serves all dialects and calibrators


def run_chain(
    specs: Sequence[StepSpec], material: Material, *, store: Path, say: Say = lambda _: None
) -> tuple[Artifact, ...]:
    """The artifact after each step, the teacher's own left out; what `store` has is not made again.

    Raises:
        CompressionError: steps in an order that makes no sense, or one that cannot be done on this model.
        SamplesError: data that a step needs are missing or refused.
    """
    check_order(specs, material)
    material = replace(material, ranges=store / "ranges")
    artifacts: list[Artifact] = []
    for number, spec in enumerate(specs, 1):
        before = artifacts[-1] if artifacts else material.teacher

        def make(out: Path, checkpoint: Path, spec: StepSpec = spec, before: Artifact = before) -> Artifact:
            return apply_step(spec, before, material, out, checkpoint=checkpoint, say=say)

        say(f"step {number} of {len(specs)}: {text_from_spec(spec)}")
        artifact, kept = keep_artifact(store, _parts(spec, before, material), make, say=say)
        if kept:
            say(f"step {number} was made before, and is taken from {artifact.path.parent}")
        artifacts.append(artifact)
    return tuple(artifacts)


def convert_once(
    source: str, options: ConvertOptions, *, store: Path, folder: Path, say: Say = lambda _: None
) -> Artifact:
    """The FP32 artifact of `convert`, kept by content.

    What a PyTorch factory reads while it runs cannot be known, so it is asked each time, and its model is
    kept by what came out. `folder` is where that is made.
    """

    def make(out: Path, _checkpoint: Path) -> Artifact:
        return convert(source, out, options, say=say)

    if detect_kind(source) != "torch-factory":
        parts: Json = {"source": source_sha256(source), "convert": asdict(options)}
        return keep_artifact(store, parts, make, say=say)[0]
    made = make(folder / "model.onnx", folder)

    def copy(out: Path, _checkpoint: Path) -> Artifact:
        return replace(made, path=onnx_model.copy_model(made.path, out))

    kept: Json = {"model": onnx_model.model_sha256(made.path), "convert": asdict(options)}
    return keep_artifact(store, kept, copy, say=say)[0]


def check_order(specs: Sequence[StepSpec], material: Material) -> None:
    """Raise CompressionError for an order in which a step would find nothing to work on."""
    narrowed: StepSpec | None = None
    for number, spec in enumerate(specs, 1):
        if isinstance(spec, steps.PruneTorch) and number > 1:
            raise CompressionError(
                f"{spec.kind} is step {number}, and must be the first: it works on the PyTorch module itself",
                fix="put it first, or use prune, which works on the ONNX graph",
            )
        if narrowed is not None and not isinstance(spec, steps.ShareRows):
            raise CompressionError(
                f"{spec.kind} comes after {narrowed.kind}, which leaves no FP32 weights to work on",
                expected="prune, sparsify and distill first, then one step that narrows the numbers",
            )
        if isinstance(spec, (steps.Quantize, steps.QuantizeWeights, steps.Cast)):
            narrowed = spec
    if specs and material.teacher.precision != "fp32":
        raise CompressionError(
            f"the source is {material.teacher.precision} already, and cannot be compressed further",
            fix="begin with the FP32 model",
        )


def check_roles(material: Material, evaluation: Samples | None) -> None:
    """Refuse data that two roles share: fitted to (calibration, training), chosen on (tuning), judged on.

    Calibration samples may be training samples: both are what the model is fitted to.

    Raises:
        SamplesError: with how many samples are shared, and the first of them.
    """
    roles = {
        "calibration": material.calibration,
        "training": material.training,
        "tuning": material.tuning,
        "evaluation": evaluation,
    }
    given = {role: samples for role, samples in roles.items() if samples is not None}
    hashes = {role: row_hashes(samples) for role, samples in given.items()}
    for first, second in itertools.combinations(given, 2):
        if {first, second} != {"calibration", "training"}:
            ours = f"the {first} file {given[first].path.name}"
            theirs = f"the {second} data {given[second].path.name}"
            refuse_shared(ours, hashes[first], theirs, hashes[second])


def _parts(spec: StepSpec, artifact: Artifact, material: Material) -> Json:
    """All that the result of a step depends on, and nothing else."""
    trains = isinstance(spec, steps.Trained) and spec.epochs > 0
    weighs = isinstance(spec, (steps.Prune, steps.PruneTorch)) and spec.importance == "taylor"
    counts = isinstance(spec, steps.ShareRows)
    mixes = isinstance(spec, steps.Quantize) and spec.mixed
    data = {
        "calibration": material.calibration,
        "training": material.training if trains or weighs or counts else None,
        "tuning": material.tuning if trains or mixes else None,
    }
    chooses = trains or mixes
    source = material.source if isinstance(spec, steps.PruneTorch) else None
    student = spec.student if isinstance(spec, steps.Distill) else None
    return {
        "step": json_from_spec(spec),
        "model": onnx_model.model_sha256(artifact.path),
        "teacher": onnx_model.model_sha256(material.teacher.path),
        "batched": artifact.batched,
        "engine": material.engine,
        "data": {role: None if samples is None else samples.sha256 for role, samples in data.items()},
        "metric": material.metric.text if material.metric is not None and chooses else None,
        "max_drop": material.max_drop if mixes else None,
        "source": None if source is None else source_sha256(source),
        "student": None if student is None else source_sha256(student),
        "convert": asdict(material.convert),
    }


def apply_step(
    spec: StepSpec,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> Artifact:
    """Run one step; `out` gets the model, `checkpoint` is a folder that survives a kill.

    Raises:
        CompressionError: the step cannot be done on this model.
        SamplesError: data that it needs are missing or refused.
    """
    if isinstance(spec, steps.Prune):
        from tritonsmith.compress.pruning.prune import apply_prune

        return apply_prune(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.PruneTorch):
        from tritonsmith.compress.pruning.prune_torch import apply_prune_torch

        return apply_prune_torch(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.Sparsify):
        from tritonsmith.compress.pruning.sparsify import apply_sparsify

        return apply_sparsify(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.Distill):
        from tritonsmith.compress.distillation.distill import apply_distill

        return apply_distill(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.Quantize):
        from tritonsmith.compress.int8.quantize import apply_quantize

        return apply_quantize(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.QuantizeWeights):
        from tritonsmith.compress.weight_only.quantize import apply_weights

        return apply_weights(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.ShareRows):
        from tritonsmith.compress.weight_only.share_rows import apply_share_rows

        return apply_share_rows(spec, artifact, material, out, say=say)
    from tritonsmith.compress.float16 import apply_cast

    return apply_cast(spec, artifact, material, out, say=say)
