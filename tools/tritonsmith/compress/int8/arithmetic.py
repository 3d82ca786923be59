"""What INT8 arithmetic this machine has."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.artifact import Json

VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
ARM = frozenset({"aarch64", "arm64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What INT8 arithmetic this machine has, and the ranges that keep it from saturating."""

    machine: str
    vnni: bool
    activations: str  # "uint8" (asymmetric) or "int8" (symmetric)
    reduce_range: bool  # weights of 7 bits: without VNNI, sums of products of 8 bits saturate

    def options(self) -> dict[str, Json]:
        return {
            "machine": self.machine,
            "vnni": self.vnni,
            "activations": self.activations,
            "weights": "int8 per channel",
            "reduce_range": self.reduce_range,
        }


def detect_arithmetic(cpuinfo: Path = Path("/proc/cpuinfo")) -> Arithmetic:
    """Read the processor's flags; a machine that shows none counts as one without VNNI."""
    machine = platform.machine()
    arm = machine in ARM
    flags: set[str] = set()
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    vnni = bool(flags & VNNI_FLAGS)
    return Arithmetic(
        machine=machine,
        vnni=vnni,
        activations="int8" if arm else "uint8",
        reduce_range=not (vnni or arm),
    )
