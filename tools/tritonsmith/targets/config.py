"""`configs/<target>.pbtxt`: a further target's configuration, from the default's.

What TensorRT's backend does with CUDA graphs, profiles and plans by compute capability is in its
`src/instance_state.cc` (InitializeGraphSpecs, BuildCudaGraph) and `src/model_state.cc`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import BATCH_AXIS, TensorSpec
from tritonsmith.engines.tensorrt.options import PlanOptions, Profile
from tritonsmith.errors import RecipeError
from tritonsmith.repository.config import SCHEDULERS, add_backend_parameters, fill_config
from tritonsmith.repository.rules import check_rules
from tritonsmith.targets.order import PlanOrder
from tritonsmith.targets.request import TargetRequest

# Of another engine or another kind of machine: a target begins without them.
NOT_INHERITED = (
    *("platform", "backend", "runtime", "default_model_filename", "cc_model_filenames"),
    *("instance_group", "optimization", "parameters", "model_operations"),
)
# TensorRT's own types; a plan has no strings and no other widths.
PLAN_TYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "BF16", "FP32")
PRECISION_MODES = {"fp16": "FP16", "bf16": "BF16", "int8": "INT8"}

Config: TypeAlias = model_config_pb2.ModelConfig
Group: TypeAlias = model_config_pb2.ModelInstanceGroup


def config_for_target(
    default: Config,
    request: TargetRequest,
    *,
    inputs: tuple[TensorSpec, ...] = (),
    plan: PlanOptions | None = None,
) -> Config:
    """The target's configuration: the default's, less NOT_INHERITED, with the target's [config] in place.

    A field of the target's table takes the place of the inherited one, all of it. `plan` has the profiles
    that TensorRT is given, and `inputs` are the artifact's; the graphs are captured for those.

    Raises:
        RecipeError: a key, type or combination that Triton would refuse, or another model than the default.
    """
    place = f"target.{request.name}"
    config = Config()
    config.CopyFrom(default)
    for field in NOT_INHERITED:
        config.ClearField(field)
    for field in request.config:
        if field in SCHEDULERS:
            config.ClearField("scheduling_choice")
        elif field not in ("input", "output"):
            config.ClearField(field)
    if request.max_batch_size is not None:
        config.max_batch_size = request.max_batch_size
    config.backend = request.backend
    add_backend_parameters(config)
    fill_config(config, request.config, place=f"{place}.config")
    check_same_model(default, config, place=place)
    if request.backend == "tensorrt":
        _complete_for_plans(config, request.name, inputs, plan or PlanOptions(), place)
    try:
        check_rules(config)
    except RecipeError as error:
        raise RecipeError(
            f"{place}: {error.what}",
            found=error.found,
            expected=error.expected,
            fix=f"set it in [{place}.config], which takes the place of what is inherited",
        ) from error
    return config


def check_same_model(default: Config, target: Config, *, place: str = "the target") -> None:
    """Raise RecipeError where a client would see another model than the default's.

    Names, data types and shapes are equal; `max_batch_size` is at most the default's, and 0 where that is 0.
    """
    most, size = default.max_batch_size, target.max_batch_size
    if size > most or size < min(1, most):
        raise RecipeError(
            f"{place}.max_batch_size does not fit the default's",
            found=size,
            expected=f"1 to {most}" if most else "0: the model has no batch axis",
            fix="raise [model] max_batch_size, which every target keeps to" if size > most > 0 else None,
        )
    for kind in ("input", "output"):
        ours, theirs = (
            [_identity(tensor) for tensor in getattr(config, kind)] for config in (default, target)
        )
        if ours != theirs:
            raise RecipeError(
                f"{place} has another {kind} than the default configuration of {default.name!r}",
                found="; ".join(theirs),
                expected="; ".join(ours),
            )
    if default.name != target.name:
        raise RecipeError(f"{place} names another model", found=target.name, expected=default.name)


def with_plans(config: Config, plans: Mapping[str, str], *, newest: str) -> Config:
    """The configuration with a plan's file name for each compute capability ("9.0": "gpu.sm90.plan").

    On a GPU that they do not name Triton opens the default file, where a hardware-compatible plan may run:
    that stays what it is where it is one of the plans, and is `newest` else.
    """
    complete = Config()
    complete.CopyFrom(config)
    complete.ClearField("cc_model_filenames")
    complete.cc_model_filenames.update(plans)
    if complete.default_model_filename not in plans.values():
        complete.default_model_filename = newest
    return complete


def config_for_fallback(config: Config, order: PlanOrder, *, engine_cache: str) -> Config:
    """The configuration that serves `order.fallback` where there is no plan: by ONNX Runtime.

    On a GPU it runs in TensorRT's execution provider, which keeps the engines that it builds in
    `engine_cache`; Triton chooses the CPU where there is no GPU.

    Raises:
        RecipeError: the order allows no fallback.
    """
    if order.fallback is None:
        raise RecipeError(
            f"target.{order.target} has no fallback",
            fix=f'set without_plan = "fallback" in [target.{order.target}], and build the model again',
        )
    precision = next(item.precision for item in order.candidates if item.file == order.fallback)
    fallback = Config()
    fallback.CopyFrom(config)
    for field in ("platform", "cc_model_filenames", "optimization"):
        fallback.ClearField(field)
    fallback.backend = "onnxruntime"
    fallback.default_model_filename = order.fallback
    for group in fallback.instance_group:
        group.ClearField("profile")
        if not group.gpus:
            group.kind = Group.KIND_AUTO
    accelerator = fallback.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    accelerator.parameters["precision_mode"] = PRECISION_MODES.get(precision, "FP32")
    accelerator.parameters["trt_engine_cache_enable"] = "true"
    accelerator.parameters["trt_engine_cache_path"] = engine_cache
    accelerator.parameters["trt_timing_cache_enable"] = "true"
    accelerator.parameters["trt_timing_cache_path"] = engine_cache
    check_rules(fallback)
    return fallback


def _identity(tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput) -> str:
    kind = model_config_pb2.DataType.Name(tensor.data_type)
    shape = f" reshaped {list(tensor.reshape.shape)}" if tensor.HasField("reshape") else ""
    return f"{tensor.name}: {kind}{list(tensor.dims)}{shape}"


def _complete_for_plans(
    config: Config, target: str, inputs: tuple[TensorSpec, ...], plan: PlanOptions, place: str
) -> None:
    for tensor in (*config.input, *config.output):
        kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        if kind not in PLAN_TYPES:
            raise RecipeError(
                f"{place}: TensorRT has no {kind}, and tensor {tensor.name!r} of {config.name!r} is one",
                expected=f"one of {', '.join(PLAN_TYPES)}",
                fix='set backend = "onnxruntime" for this target',
            )
    config.platform = "tensorrt_plan"
    config.default_model_filename = f"{target}.plan"
    _complete_groups(config, len(plan.profiles), place)
    if not config.optimization.HasField("cuda"):
        config.optimization.cuda.graphs = True
        for spec in _graph_specs(config, inputs, plan.profiles):
            if spec not in config.optimization.cuda.graph_spec:
                config.optimization.cuda.graph_spec.append(spec)


def _complete_groups(config: Config, profile_count: int, place: str) -> None:
    """Every group on GPUs, and with all profiles where it names none: Triton would take the first alone."""
    if not config.instance_group:
        config.instance_group.add(count=1)
    for index, group in enumerate(config.instance_group):
        at = f"{place}.config.instance_group[{index}]"
        if group.kind == Group.KIND_AUTO:
            group.kind = Group.KIND_GPU
        if group.kind != Group.KIND_GPU:
            raise RecipeError(
                f"{at}.kind does not fit TensorRT", found=Group.Kind.Name(group.kind), expected="KIND_GPU"
            )
        for profile in group.profile:
            if not profile.isdecimal() or int(profile) >= max(1, profile_count):
                raise RecipeError(
                    f"{at}.profile names no optimization profile",
                    found=profile,
                    expected=f'"0" to "{max(1, profile_count) - 1}"',
                )
        if profile_count > 1 and not group.profile:
            group.profile.extend(str(number) for number in range(profile_count))


def _graph_specs(
    config: Config, inputs: tuple[TensorSpec, ...], profiles: tuple[Profile, ...]
) -> Iterator[model_config_pb2.ModelOptimizationPolicy.Cuda.GraphSpec]:
    """A graph for each batch that a profile names or Triton prefers, other free axes at their best length.

    Inputs without another free axis are left out: Triton then knows the shape.
    """
    preferred = config.dynamic_batching.preferred_batch_size
    for profile in profiles:
        lengths = {axis: lengths.best for axis, lengths in profile.axes.items()}
        free = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)} - {BATCH_AXIS}
        for size in _graph_batches(profile, list(preferred), config.max_batch_size):
            spec = model_config_pb2.ModelOptimizationPolicy.Cuda.GraphSpec(batch_size=size)
            if free <= lengths.keys() and free:
                for tensor in inputs:
                    axes = tensor.shape[1:] if config.max_batch_size else tensor.shape
                    dims = [lengths[axis] if isinstance(axis, str) else axis for axis in axes]
                    spec.input[tensor.name].dim.extend(dims)
            yield spec


def _graph_batches(profile: Profile, preferred: list[int], max_batch_size: int) -> list[int]:
    if not max_batch_size:
        return [0]
    lengths = profile.axes.get(BATCH_AXIS)
    if lengths is None:
        return sorted({1, *preferred, max_batch_size})
    sizes = {lengths.minimum, lengths.best, lengths.maximum, *preferred}
    top = min(lengths.maximum, max_batch_size)
    return sorted(size for size in sizes if max(1, lengths.minimum) <= size <= top)
