"""An ONNX file to a plan: the thin part that talks to TensorRT's builder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tritonsmith.artifact import Json, TensorSpec, sha256_of
from tritonsmith.engines.tensorrt.cuda import open_cuda
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.flags import BuildFlags, check_options, flags_from_options
from tritonsmith.engines.tensorrt.inspect import layers_from_engine
from tritonsmith.engines.tensorrt.log import Messages, logger_of
from tritonsmith.engines.tensorrt.network import check_inputs, check_precision, precisions_in
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.plan_file import load_engine, write_plan
from tritonsmith.engines.tensorrt.profiles import free_axes, shapes_from_profile
from tritonsmith.engines.tensorrt.progress import interruptible, monitor_of
from tritonsmith.engines.tensorrt.timing_cache import timing_cache_kept
from tritonsmith.engines.tensorrt.versions import Capabilities, capabilities_of, need_tensorrt
from tritonsmith.engines.tensorrt.versions import device as device_at
from tritonsmith.errors import PlanError


def build_plan(
    onnx: Path,
    out: Path,
    *,
    inputs: Sequence[TensorSpec],
    options: PlanOptions,
    precision: str,
    device: int = 0,
    timing_cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> PlanFacts:
    """Compile `onnx`, whose tensors hold `precision`, into the plan `out` for the GPU `device`.

    `options` has its profiles filled in (`profiles.filled_profiles`). `timing_cache` is a folder where the
    builder's measurements are kept for the next build with this TensorRT and GPU. What the inspector says of
    the layers is `measured["layers"]` of the facts.

    Raises:
        PlanError: no TensorRT or GPU here, options that this version does not have, or a graph that it
            refuses; TensorRT's own reason is in the message.
        KeyboardInterrupt: ended by Ctrl-C; nothing was written.
    """
    started = time.monotonic()
    trt = need_tensorrt(device)
    capabilities = capabilities_of(str(trt.__version__))
    check_options(options, capabilities)
    if free_axes(inputs) and not options.profiles:
        raise PlanError(
            f"{onnx} has free axes but no optimization profile", found=", ".join(free_axes(inputs))
        )
    machine = device_at(device)
    with open_cuda(device):
        logger, messages = logger_of(trt)
        messages.clear()
        builder = _make_builder(trt, logger, messages)
        network, parser = _parse(trt, builder, logger, onnx, capabilities)
        check_inputs(network, inputs, onnx)
        held = precisions_in(trt, network, capabilities)
        check_precision(precision, held, onnx)
        config = _configure(trt, builder, options, flags_from_options(options, held, capabilities))
        _add_profiles(builder, config, network, inputs, options)
        say(f"building {out.name} ({precision}) with TensorRT {capabilities.version} for {machine.gpu}")
        with timing_cache_kept(config, timing_cache, version=capabilities.version, device=machine, say=say):
            serialized = _build(trt, builder, network, config, capabilities, messages, onnx, say)
        del parser  # it owns the weights that the network points to
        write_plan(serialized, out)
        layers = _inspect(trt, out, inputs, options)
    return _facts(onnx, out, options, precision, capabilities, machine, layers, time.monotonic() - started)


def _make_builder(trt: ModuleType, logger: Any, messages: Messages) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # all that the binding says where CUDA does not start
        raise PlanError("TensorRT's builder does not start", found=messages.reason(str(error))) from error


def _parse(
    trt: ModuleType, builder: Any, logger: Any, onnx: Path, capabilities: Capabilities
) -> tuple[Any, Any]:
    bits = 0
    for name in capabilities.network_flags:
        bits |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    network = builder.create_network(bits)
    parser = trt.OnnxParser(network, logger)
    if not onnx.is_file():
        raise PlanError(f"there is no file {onnx}")
    if not parser.parse_from_file(str(onnx)):  # by path: external data lies beside it
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise PlanError(
            f"TensorRT {capabilities.version} cannot read {onnx}",
            found="\n    ".join(str(error.desc()) for error in errors) or "TensorRT gave no reason",
        )
    return network, parser


def _configure(trt: ModuleType, builder: Any, options: PlanOptions, flags: BuildFlags) -> Any:
    config = builder.create_builder_config()
    for name in flags.builder:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in flags.cleared:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if flags.hardware_level is not None:
        level = getattr(trt.HardwareCompatibilityLevel, flags.hardware_level)
        config.hardware_compatibility_level = level
    if flags.left_out_tactics:
        sources = config.get_tactic_sources()
        for name in flags.left_out_tactics:
            sources &= ~(1 << int(getattr(trt.TacticSource, name)))
        config.set_tactic_sources(sources)
    return config


def _add_profiles(
    builder: Any, config: Any, network: Any, inputs: Sequence[TensorSpec], options: PlanOptions
) -> None:
    for number, wanted in enumerate(options.profiles):
        profile = builder.create_optimization_profile()
        try:
            for spec in inputs:
                profile.set_shape(spec.name, *shapes_from_profile(wanted, spec))
        except RuntimeError as error:
            raise PlanError(f"TensorRT refuses optimization profile {number}", found=error) from error
        if config.add_optimization_profile(profile) != number:
            raise PlanError(f"TensorRT refuses optimization profile {number}", found=dict(wanted.axes))


def _build(
    trt: ModuleType,
    builder: Any,
    network: Any,
    config: Any,
    capabilities: Capabilities,
    messages: Messages,
    onnx: Path,
    say: Callable[[str], None],
) -> Any:
    with interruptible(enabled=capabilities.progress) as interruption:
        if capabilities.progress:
            monitor = monitor_of(trt, say, interruption)
            config.progress_monitor = monitor
        else:
            say(f"TensorRT {capabilities.version} shows no progress, and Ctrl-C takes effect when it is done")
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise PlanError(
            f"TensorRT {capabilities.version} cannot build a plan from {onnx}",
            found=messages.reason("TensorRT gave no reason"),
        )
    return serialized


def _inspect(trt: ModuleType, out: Path, inputs: Sequence[TensorSpec], options: PlanOptions) -> Json:
    """The plan opened again from disk: that it loads, and what its layers are at the best shapes."""
    engine = load_engine(trt, out)
    if options.strip_weights:
        return layers_from_engine(trt, engine, None)
    context = engine.create_execution_context()
    if context is None:
        raise PlanError(f"TensorRT cannot run {out}")
    for spec in inputs if options.profiles else ():
        context.set_input_shape(spec.name, shapes_from_profile(options.profiles[0], spec)[1])
    return layers_from_engine(trt, engine, context)


def _facts(
    onnx: Path,
    out: Path,
    options: PlanOptions,
    precision: str,
    capabilities: Capabilities,
    machine: Device,
    layers: Json,
    duration_s: float,
) -> PlanFacts:
    return PlanFacts(
        file=out.name,
        sha256=sha256_of(out),
        size_bytes=out.stat().st_size,
        source=onnx.name,
        source_sha256=sha256_of(onnx),
        precision=precision,
        tensorrt=capabilities.version,
        device=machine,
        version_compatible=options.version_compatible,
        hardware_compatibility=options.hardware_compatibility,
        stripped=options.strip_weights,
        duration_s=duration_s,
        measured={"layers": layers},
    )
