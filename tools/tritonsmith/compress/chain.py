"""A chain of steps from one FP32 artifact: each step's result is kept by content, so nothing is made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.artifact import Artifact
from tritonsmith.compress import steps
from tritonsmith.compress.steps import StepSpec
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
    convert: ConvertOptions = ConvertOptions()


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
        from tritonsmith.compress.prune import apply_prune

        return apply_prune(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.PruneTorch):
        from tritonsmith.compress.prune_torch import apply_prune_torch

        return apply_prune_torch(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.Sparsify):
        from tritonsmith.compress.sparsify import apply_sparsify

        return apply_sparsify(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.Distill):
        from tritonsmith.compress.distill import apply_distill

        return apply_distill(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.Quantize):
        from tritonsmith.compress.quantize import apply_quantize

        return apply_quantize(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.QuantizeWeights):
        from tritonsmith.compress.weights import apply_weights

        return apply_weights(spec, artifact, material, out, checkpoint=checkpoint, say=say)
    if isinstance(spec, steps.ShareRows):
        from tritonsmith.compress.share_rows import apply_share_rows

        return apply_share_rows(spec, artifact, material, out, say=say)
    from tritonsmith.compress.float16 import apply_cast

    return apply_cast(spec, artifact, material, out, say=say)
