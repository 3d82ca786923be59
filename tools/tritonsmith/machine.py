"""The machine that a number was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from tritonsmith.artifact import tool_versions


def describe_machine() -> dict[str, str | int]:
    """CPU, cores that this process may use, memory in bytes, system and versions of the tools."""
    versions = tool_versions("tritonsmith", "numpy", "onnx", "onnxruntime", "openvino", "tritonclient")
    return {
        "cpu": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}, glibc {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        **versions,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
