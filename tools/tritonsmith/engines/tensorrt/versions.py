"""What TensorRT is here, and what each of its versions offers: the one place that knows.

The table was read from the published bindings of 8.6.1, 10.0.1 to 10.16.1 and 11.4.0; a test reads it again.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from tritonsmith.engines.tensorrt.cuda import describe_device
from tritonsmith.engines.tensorrt.facts import Device
from tritonsmith.errors import PlanError

BINDINGS = ("tensorrt", "tensorrt_bindings")  # the whole package; its binding alone, beside other libraries
OLDEST = (8, 6)
NEWEST_MAJOR = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one version of TensorRT offers; names are those of the members of its enums."""

    version: str
    network_flags: tuple[str, ...]  # of NetworkDefinitionCreationFlag, always passed
    strongly_typed: bool  # computes in exactly the data types of the graph
    precision_flags: tuple[
        tuple[str, str], ...
    ]  # precision -> the BuilderFlag that allows it; () where typed
    precisions: tuple[str, ...]  # that a graph may hold
    progress: bool  # IProgressMonitor: builds are shown and can be ended
    strip_flags: tuple[str, ...]  # of BuilderFlag; () where plans cannot be stripped
    hardware_levels: tuple[str, ...]  # of PlanOptions.hardware_compatibility
    left_out_tactics: tuple[str, ...]  # of TacticSource; libraries of their own that we do not ask for


def capabilities_of(version: str) -> Capabilities:
    """What TensorRT `version` offers.

    Raises:
        PlanError: a version that this package does not know.
    """
    number = number_from_version(version)
    if number < OLDEST or number[0] > NEWEST_MAJOR or number[0] == 9:
        raise PlanError(
            f"TensorRT {version} cannot be used",
            expected=f"8.6, 10.x or {NEWEST_MAJOR}.x",
            fix="install one of these",
        )
    if number[0] == 8:
        return Capabilities(
            version=version,
            network_flags=("EXPLICIT_BATCH",),
            strongly_typed=False,
            precision_flags=(("fp16", "FP16"), ("int8", "INT8")),
            precisions=("fp32", "fp16", "int8"),
            progress=False,
            strip_flags=(),
            hardware_levels=("none", "ampere_plus"),
            left_out_tactics=("CUBLAS", "CUBLAS_LT", "CUDNN"),
        )
    levels = ("none", "ampere_plus", "same_compute_capability")
    return Capabilities(
        version=version,
        network_flags=("STRONGLY_TYPED",),
        strongly_typed=True,
        precision_flags=(),
        precisions=("fp32", "fp16", "bf16", "int8", "fp8", "int4"),
        progress=True,
        strip_flags=("STRIP_PLAN", "REFIT_IDENTICAL"),
        hardware_levels=levels if number >= (10, 10) else levels[:2],
        left_out_tactics=(),
    )


def number_from_version(version: str) -> tuple[int, ...]:
    """`10.16.1.11` as numbers, to be compared.

    Raises:
        PlanError: not a version of at least two numbers.
    """
    parts = re.sub(r"\.post\d+$", "", version).split(".")  # a wheel packed again, not another TensorRT
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        raise PlanError(
            "not a version of TensorRT", found=repr(version), expected="numbers with dots, as 10.16.1.11"
        )
    return tuple(int(part) for part in parts)


def import_tensorrt() -> ModuleType:
    """The binding: `tensorrt`, else `tensorrt_bindings` where the libraries came another way.

    Raises:
        PlanError: neither can be imported; what is missing is said.
    """
    reasons = []
    flags = sys.getdlopenflags()
    # 8.6's plugin library names functions of cuBLAS and cuDNN that are never called: bind when called.
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        for name in BINDINGS:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                reasons.append(f"the Python package {error.name!r} is not installed")
            except (ImportError, OSError, RuntimeError) as error:
                reasons.append(f"{name} cannot be imported: {' '.join(str(error).split())}")
    finally:
        sys.setdlopenflags(flags)
    raise PlanError(
        "TensorRT cannot be used",
        found="; ".join(reasons),
        fix="pip install tensorrt, or use NVIDIA's Triton container (docker/)",
    )


def why_unavailable(device: int = 0) -> str | None:
    """What exactly keeps this process from building and running plans; None where nothing does.

    All that is missing is listed: the binding and its libraries, or its version; the driver, or the GPU.
    TensorRT itself is not asked: without a GPU its Runtime ends the process (8.6) and its Builder is a bare
    TypeError.
    """
    looks: tuple[Callable[[], object], ...] = (
        lambda: capabilities_of(str(import_tensorrt().__version__)),
        lambda: describe_device(device),
    )
    reasons = []
    for look in looks:
        try:
            look()
        except PlanError as error:
            reasons.append(error.reason)
    return "; ".join(reasons) or None


def device(index: int = 0) -> Device:
    """The GPU with this index and the driver over it.

    Raises:
        PlanError: there is no driver or no such GPU.
    """
    return describe_device(index)


def need_tensorrt(device: int = 0) -> ModuleType:
    """The binding, on a machine that can build and run plans.

    Raises:
        PlanError: it cannot; the reason is `why_unavailable`'s.
    """
    if (reason := why_unavailable(device)) is not None:
        raise PlanError(
            "TensorRT plans cannot be built or run on this machine",
            found=reason,
            fix="use a machine with an NVIDIA GPU and TensorRT (docker/ has one), or build with --defer",
        )
    return import_tensorrt()
