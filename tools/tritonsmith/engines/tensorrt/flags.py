"""What a build asks of TensorRT's builder, as plain data: names of enum members, decided without a GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.versions import Capabilities
from tritonsmith.errors import PlanError

HARDWARE_MEMBERS = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}
LEVELS = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFlags:
    """Members of TensorRT's enums, by name."""

    network: tuple[str, ...]  # NetworkDefinitionCreationFlag
    builder: tuple[str, ...]  # BuilderFlag, set
    cleared: tuple[str, ...]  # BuilderFlag, cleared
    hardware_level: str | None  # HardwareCompatibilityLevel; None: left alone
    left_out_tactics: tuple[str, ...]  # TacticSource


def flags_from_options(options: PlanOptions, held: Collection[str], capabilities: Capabilities) -> BuildFlags:
    """What to set for `options` and a graph that holds these precisions ("fp16", "int8", ...).

    No flag asks for a precision on versions whose networks are strongly typed. On 8.6 the flags allow what
    the graph holds and nothing else.

    Raises:
        PlanError: this version does not have what the options or the graph ask for.
    """
    check_options(options, capabilities)
    missing = sorted(set(held) - set(capabilities.precisions))
    if missing:
        raise PlanError(
            f"TensorRT {capabilities.version} does not have the precision {' and '.join(missing)}",
            found=f"a graph that holds {', '.join(sorted(held))}",
            expected=f"only {', '.join(capabilities.precisions)}",
        )
    wanted = [flag for precision, flag in capabilities.precision_flags if precision in held]
    wanted += ["SPARSE_WEIGHTS"] if options.sparse_weights else []
    wanted += ["VERSION_COMPATIBLE"] if options.version_compatible else []
    wanted += capabilities.strip_flags if options.strip_weights else ()
    wanted += ["TF32"] if options.tf32 else []
    return BuildFlags(
        network=capabilities.network_flags,
        builder=tuple(wanted),
        cleared=() if options.tf32 else ("TF32",),
        hardware_level=HARDWARE_MEMBERS.get(options.hardware_compatibility),
        left_out_tactics=capabilities.left_out_tactics,
    )


def check_options(options: PlanOptions, capabilities: Capabilities) -> None:
    """Raise PlanError where this version of TensorRT cannot do what the options ask for."""
    name = f"TensorRT {capabilities.version}"
    if options.optimization_level not in LEVELS:
        raise PlanError(
            "no such optimisation level",
            found=options.optimization_level,
            expected="0 to 5",
            fix="the default is 3",
        )
    if options.workspace_bytes is not None and options.workspace_bytes <= 0:
        raise PlanError("the workspace limit is not positive", found=f"{options.workspace_bytes} bytes")
    if options.hardware_compatibility not in capabilities.hardware_levels:
        raise PlanError(
            f"{name} does not have the hardware compatibility {options.hardware_compatibility!r}",
            expected=" or ".join(capabilities.hardware_levels),
        )
    if options.strip_weights and not capabilities.strip_flags:
        raise PlanError(
            f"{name} cannot build plans without their weights",
            expected="TensorRT 10 or newer",
            fix="leave strip_weights out",
        )
    if options.strip_weights and options.version_compatible:
        raise PlanError(
            "a version-compatible plan cannot be refitted, so its weights cannot be stripped",
            fix="leave strip_weights or version_compatible out",
        )
