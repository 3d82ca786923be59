"""Where a plan runs, by what is recorded of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.fit import capability_from_text, fits, sm_name
from tritonsmith.errors import PlanError

H100 = PlanFacts(
    file="gpu.sm90.plan",
    sha256="0" * 64,
    size_bytes=1,
    source="gpu.fp16.onnx",
    source_sha256="0" * 64,
    precision="fp16",
    tensorrt="10.16.1.11",
    device=Device(gpu="NVIDIA H100", compute_capability="9.0", driver="580.159.04", memory_bytes=1),
    version_compatible=False,
    hardware_compatibility="none",
    stripped=False,
    duration_s=1.0,
)
COMPATIBLE = replace(H100, version_compatible=True)


@pytest.mark.parametrize(
    ("text", "capability"),
    [
        ("9.0", (9, 0)),
        ("90", (9, 0)),
        ("sm90", (9, 0)),
        ("SM_86", (8, 6)),
        ("sm120", (12, 0)),
        ("12.1", (12, 1)),
    ],
)
def test_compute_capabilities_are_read(text: str, capability: tuple[int, int]) -> None:
    assert capability_from_text(text) == capability


@pytest.mark.parametrize("text", ["", "9", "sm", "hopper", "9.0.1", "sm9000", "sm90a"])
def test_other_texts_are_no_compute_capability(text: str) -> None:
    with pytest.raises(PlanError, match="not a compute capability"):
        capability_from_text(text)


def test_plans_are_named_by_their_architecture() -> None:
    assert sm_name("9.0") == "sm90"
    assert sm_name("12.0") == "sm120"


@pytest.mark.parametrize(
    ("facts", "tensorrt", "reason"),
    [
        (H100, "10.16.1.11", None),
        (H100, "10.16.1", None),
        (H100, "10.16.2", "only under their own version"),
        (H100, "10.16.1.12", "only under their own version"),
        (H100, "11.4.0.106", "only under their own version"),
        (COMPATIBLE, "10.16.2", None),
        (COMPATIBLE, "10.20.0", None),
        (COMPATIBLE, "10.9.0", "only with newer versions"),
        (COMPATIBLE, "11.0.0", "within one major version"),
        (COMPATIBLE, "8.6.1", "within one major version"),
    ],
)
def test_versions(facts: PlanFacts, tensorrt: str, reason: str | None) -> None:
    said = fits(facts, tensorrt=tensorrt, gpu="sm90")
    assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("level", "gpu", "reason"),
    [
        ("none", "9.0", None),
        ("none", "sm80", "only where they were built"),
        ("same_compute_capability", "9.0", None),
        ("same_compute_capability", "sm89", "of the same compute capability"),
        ("ampere_plus", "sm80", None),
        ("ampere_plus", "sm120", None),
        ("ampere_plus", "sm75", "8.0 (Ampere) and newer"),
    ],
)
def test_gpus(level: str, gpu: str, reason: str | None) -> None:
    said = fits(replace(H100, hardware_compatibility=level), tensorrt="10.16.1.11", gpu=gpu)
    assert said is None if reason is None else reason in str(said)
    assert reason is None or "compute capability 9.0" in str(said)
