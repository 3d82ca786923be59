"""What is wrong with targets, found before the long work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import steps
from tritonsmith.compress.steps import StepSpec
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.profiles import filled_profiles, profiles_from_traffic
from tritonsmith.engines.tensorrt.versions import why_unavailable
from tritonsmith.errors import PlanError, RecipeError, UsageError
from tritonsmith.targets.config import config_for_target
from tritonsmith.targets.request import TargetRequest

if TYPE_CHECKING:
    from tritonsmith.recipe import BuildRequest

NARROWING = (steps.Quantize, steps.QuantizeWeights, steps.Cast)


def check_targets(request: BuildRequest) -> None:
    """Raise for targets that are wrong whatever the model is, before anything long begins.

    Raises:
        UsageError: a precision without the data to judge it, two targets of one name, nothing to defer, a
            chain that TensorRT cannot be given.
    """
    names = [target.name for target in request.targets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two targets are named {twice!r}", expected="a name for each")
    planned = [target for target in request.targets if target.backend == "tensorrt"]
    if request.defer and not planned:
        raise UsageError("--defer defers nothing", expected="a target whose backend is tensorrt")
    for target in planned:
        split_chain(request.steps, target)
        narrow = target.precision != "fp32"
        if target.precision == "int8" and request.calibration is None:
            raise UsageError(
                f"target {target.name!r} asks for INT8, which needs calibration data, and none is made up",
                expected="--calibration X.npz, or accuracy.calibration in a recipe",
            )
        if target.precision == "int8" and request.evaluation is None:
            raise UsageError(
                f"target {target.name!r} asks for INT8, which needs an accuracy budget",
                expected="--evaluation X.npz --metric M --max-drop D, or [accuracy] in a recipe",
            )
        if narrow and request.evaluation is not None and request.max_drop is None:
            raise UsageError(
                f"target {target.name!r} with precision {target.precision} needs --max-drop",
                expected="how much worse the metric may become; 0.01 of accuracy is one percentage point",
            )


def split_chain(
    specs: Sequence[StepSpec], target: TargetRequest
) -> tuple[tuple[StepSpec, ...], steps.Quantize | None]:
    """The steps of a chain that leave the model in floating point, and how it quantizes, if it does.

    Raises:
        UsageError: a chain that TensorRT cannot be given in its own way.
    """
    if any(isinstance(spec, steps.QuantizeWeights) for spec in specs):
        raise UsageError(
            f"target {target.name!r}: {steps.QuantizeWeights.kind} has no form for TensorRT here",
            expected="a chain of prune, sparsify, distill, share-rows, quantize and cast",
            fix="leave the target out, or build it under another name without that step",
        )
    quantize = next((spec for spec in specs if isinstance(spec, steps.Quantize)), None)
    return tuple(spec for spec in specs if not isinstance(spec, NARROWING)), quantize


def compiled_here(request: BuildRequest) -> frozenset[str]:
    """The targets whose plans are built on this machine, now.

    Raises:
        PlanError: one must be, and cannot; what is missing is said.
    """
    planned = [target for target in request.targets if target.backend == "tensorrt"]
    planned = [target for target in planned if not request.defer and target.without_plan != "defer"]
    if not planned:
        return frozenset()
    missing = why_unavailable()
    if missing is None:
        return frozenset(target.name for target in planned)
    must = [target.name for target in planned if target.without_plan == "fail"]
    if must:
        raise PlanError(
            f"target {must[0]!r}: a TensorRT plan cannot be built on this machine",
            found=missing,
            fix="add --defer, and the GPU machine builds the plan before its server is ready; or build on a "
            "machine with a GPU, in NVIDIA's container (docker/)",
        )
    return frozenset()


def plan_options_of(
    targets: Sequence[TargetRequest], default: model_config_pb2.ModelConfig, artifact: Artifact
) -> dict[str, PlanOptions]:
    """Each target's plan options with every profile complete, once its configuration is known to be sound.

    Raises:
        RecipeError: a configuration that Triton would refuse or that is another model than the default's, a
            free axis without a range, or a range that does not fit.
    """
    options = {target.name: _options_of(target, default, artifact) for target in targets}
    for target in targets:
        config_for_target(default, target, inputs=artifact.inputs, plan=options[target.name])
    return options


def _options_of(
    request: TargetRequest, default: model_config_pb2.ModelConfig, artifact: Artifact
) -> PlanOptions:
    if request.backend != "tensorrt":
        return request.plan
    size = default.max_batch_size if request.max_batch_size is None else request.max_batch_size
    try:
        if request.traffic is None:
            return filled_profiles(request.plan, artifact.inputs, size)
        given = request.plan.profiles[0].axes if request.plan.profiles else None
        statistics = _statistics_from(request.traffic)
        profiles = profiles_from_traffic(statistics, artifact.inputs, size, model=default.name, ranges=given)
        return replace(request.plan, profiles=profiles)
    except PlanError as error:
        raise RecipeError(
            f"target.{request.name}: {error.what}",
            found=error.found,
            expected=error.expected,
            fix=error.fix,
        ) from error


def _statistics_from(path: Path) -> Json:
    try:
        statistics: Json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path} cannot be read", found=error, expected="Triton's statistics, as JSON"
        ) from error
    return statistics
