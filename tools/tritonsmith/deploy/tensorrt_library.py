"""Which TensorRT an image holds, asked of its own library: the binding beside it must be of that very build.

Runs on a bare Python and without a GPU: `python3 -m tritonsmith.deploy.tensorrt_library`, in Dockerfile.gpu.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from pathlib import Path

from tritonsmith.errors import PlanError

FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib/sbsa-linux-gnu"),
    *("/usr/lib", "/usr/local/lib", "/usr/local/tensorrt/lib", "/opt/tensorrt/lib"),
)
_PARTS = ("Major", "Minor", "Patch", "Build")
_LIBRARY = re.compile(r"libnvinfer\.so\.\d+")


def find_library(folders: tuple[str, ...] = FOLDERS) -> Path:
    """The libnvinfer of the first folder that has one.

    Raises:
        PlanError: none has, or one has several major versions.
    """
    for folder in folders:
        found = sorted(path for path in Path(folder).glob("libnvinfer.so.*") if _LIBRARY.fullmatch(path.name))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise PlanError(f"{folder} holds several versions of TensorRT", found=names)
        if found:
            return found[0]
    raise PlanError(
        "this image holds no TensorRT",
        expected=f"libnvinfer.so.<major> in one of {', '.join(folders)}",
        fix="build from NVIDIA's Triton image, the py3 one",
    )


def version_of_library(library: Path) -> str:
    """`10.16.1.11`: all four numbers, as a published binding of that build has them.

    Raises:
        PlanError: it cannot be loaded, or is older than TensorRT 10, which first tells them.
    """
    try:
        loaded = ctypes.CDLL(str(library))
        return ".".join(str(getattr(loaded, f"getInferLib{part}Version")()) for part in _PARTS)
    except (OSError, AttributeError) as error:
        raise PlanError(
            f"{library} does not say its version", found=error, expected="TensorRT 10 or later"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Print the version of the TensorRT that is installed here."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tritonsmith.deploy.tensorrt_library", description=main.__doc__
    )
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="where to look for libnvinfer.so.<major>")
    given = parser.parse_args(arguments)
    try:
        print(version_of_library(find_library(tuple(given.folders))))
    except PlanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
