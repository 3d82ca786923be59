"""Whether a plan runs on a TensorRT version and a GPU, by what is recorded of it."""

from __future__ import annotations

import re

from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.engines.tensorrt.versions import number_from_version
from tritonsmith.errors import PlanError

AMPERE = (8, 0)
_DIGITS = re.compile(r"(?:sm_?)?(\d{1,2})(\d)", re.IGNORECASE)
_DOTTED = re.compile(r"(?:sm_?)?(\d{1,2})\.(\d)", re.IGNORECASE)


def capability_from_text(text: str) -> tuple[int, int]:
    """A compute capability as `9.0`, `90`, `sm90` or `sm_90`; the last digit is the minor number.

    Raises:
        PlanError: none of these.
    """
    match = _DOTTED.fullmatch(text.strip()) or _DIGITS.fullmatch(text.strip())
    if match is None:
        raise PlanError("not a compute capability", found=repr(text), expected="9.0, 90 or sm90")
    return int(match[1]), int(match[2])


def sm_name(capability: str) -> str:
    """`sm90` for `9.0`: what plans are named by."""
    major, minor = capability_from_text(capability)
    return f"sm{major}{minor}"


def fits(facts: PlanFacts, *, tensorrt: str, gpu: str) -> str | None:
    """Why the plan does not run under this TensorRT version and compute capability; None: it does.

    `tensorrt` may leave out the last numbers ("10.16.1"), which are then not compared. Within one compute
    capability GPUs are taken as equal; TensorRT itself warns where the model of GPU is another one.

    Raises:
        PlanError: a version or a compute capability that is none.
    """
    return _version_reason(facts, tensorrt) or _gpu_reason(facts, gpu)


def _version_reason(facts: PlanFacts, tensorrt: str) -> str | None:
    built, running = number_from_version(facts.tensorrt), number_from_version(tensorrt)
    common = min(len(built), len(running))
    if built[:common] == running[:common]:
        return None
    needs = f"{facts.file} was built by TensorRT {facts.tensorrt}, and TensorRT {tensorrt} is to run it"
    if not facts.version_compatible:
        return f"{needs}: plans run only under their own version unless they are built version-compatible"
    if built[0] != running[0]:
        return f"{needs}: it is version-compatible, which holds within one major version"
    if running[:common] < built[:common]:
        return f"{needs}: it is version-compatible, but only with newer versions"
    return None


def _gpu_reason(facts: PlanFacts, gpu: str) -> str | None:
    built, running = capability_from_text(facts.device.compute_capability), capability_from_text(gpu)
    if built == running:
        return None
    needs = (
        f"{facts.file} was built on {facts.device.gpu} (compute capability {built[0]}.{built[1]}), "
        f"and the GPU has {running[0]}.{running[1]}"
    )
    if facts.hardware_compatibility == "ampere_plus":
        if running >= AMPERE:
            return None
        return f"{needs}: it runs on 8.0 (Ampere) and newer"
    if facts.hardware_compatibility == "same_compute_capability":
        return f"{needs}: it runs on GPUs of the same compute capability"
    return f"{needs}: plans run only where they were built unless they are built hardware-compatible"
