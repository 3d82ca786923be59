"""TensorRT's published bindings without its libraries: enough to look at every class, method and enum.

The wheels on the package index are about 1 MB. They want `libnvinfer` and its siblings by name; empty
libraries of these names, compiled here, are all that an import takes. Nothing of TensorRT runs with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tritonsmith.files import locked
from tritonsmith.server.provision import cache_folder, clean_environment, unpack_wheel

TESTS = Path(__file__).parent
SOURCES = TESTS / "engines" / "tensorrt"
BINDINGS = {  # version -> requirement; the last of each major version that a whole or bare wheel exists for
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers")
LAST_PYTHON_OF_86 = (3, 11)


def run_with_binding(
    version: str, code: str, *arguments: str, driver: bool = False, gpus: int = 1, libraries: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run Python code in which `import tensorrt_bindings` is this version's binding.

    With `driver`, `libcuda.so.1` is the stand-in of libcuda.c. Without `libraries`, the binding's own are not
    there. Skips where there is no C compiler, and where
    this Python has no wheel of 8.6.
    """
    folder = binding_folder(version)
    paths = [str(stand_in_libraries(version.split(".")[0]))] if libraries else []
    paths += [str(stand_in_driver())] if driver else []
    environment = clean_environment() | {
        "LD_LIBRARY_PATH": ":".join(paths),
        "PYTHONPATH": ":".join((str(folder), str(TESTS), str(TESTS.parent / "tools"))),
        "STAND_IN_GPUS": str(gpus),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def binding_folder(version: str) -> Path:
    """The unpacked wheel of a binding, downloaded once into the cache folder."""
    if version.startswith("8.") and sys.version_info[:2] > LAST_PYTHON_OF_86:
        pytest.skip(f"TensorRT {version} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]}")
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return unpack_wheel(BINDINGS[version], cache_folder() / "tensorrt" / f"bindings-{version}-{python}")


def stand_in_libraries(major: str) -> Path:
    """A folder with libnvinfer.so.<major> and its siblings, which hold names and nothing behind them."""
    names = {f"lib{name}.so.{major}": SOURCES / "libnvinfer.c" for name in LIBRARIES[:1]}
    names |= {f"lib{name}.so.{major}": Path(os.devnull) for name in LIBRARIES[1:]}
    return _compiled(f"libraries-{major}", names)


def stand_in_driver() -> Path:
    """A folder with a libcuda.so.1 whose GPU is this machine's memory."""
    return _compiled("driver", {"libcuda.so.1": SOURCES / "libcuda.c"})


def stand_in_cuda_libraries() -> Path:
    """cuBLAS and cuDNN as 8.6's plugin library names them; it calls nothing of them here."""
    names = ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8")
    return _compiled("cuda-12", {name: Path(os.devnull) for name in names})


def _compiled(folder_name: str, names: dict[str, Path]) -> Path:
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("no gcc: TensorRT's bindings are looked at over libraries that it compiles")
    folder = cache_folder() / "tensorrt" / folder_name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        for name, source in names.items():
            library = folder / name
            if library.exists() and (
                not source.is_file() or library.stat().st_mtime > source.stat().st_mtime
            ):
                continue
            partial = folder / f".{name}"
            command = [compiler, "-O1", "-shared", "-fPIC", "-x", "c", str(source)]
            subprocess.run([*command, f"-Wl,-soname,{name}", "-o", str(partial)], check=True)
            partial.replace(library)
    return folder
