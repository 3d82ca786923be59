"""What a GPU machine without a package index needs, laid out as folders: one a bundle.

python/     a CPython 3.10 that runs from any path, and the wheels of wheels.txt in python/site
tensorrt/   TensorRT 8.6.0 whole, and stand-ins for libraries that it only names
code/       the package, the tests marked `gpu`, the benchmark
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

from gpu.parts import PackError, Say
from tritonsmith.server.interpreter import survey

ROOT = Path(__file__).resolve().parents[2]
VERSION = "3.10"
TENSORRT = "tensorrt==8.6.0"
# libnvinfer_plugin names these; nothing calls into them with cuBLAS and cuDNN left out of the tactics.
STAND_INS = ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8")
STDLIB_LEFT_OUT = shutil.ignore_patterns(
    *("site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo"),
    *("config-*", "__pycache__", "*.a", "_test*.so"),
    *("_tkinter*.so", "nis*.so", "_curses*.so", "readline*.so", "_dbm*.so", "_gdbm*.so"),
)
GLIBC = re.compile(r"/(ld-linux|libc|libm|libdl|librt|libpthread|libutil|libresolv|libnsl)[-.]")
CODE = ("tools/tritonsmith", "tests/gpu", "perf/gpu", "pyproject.toml")
CODE_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "backends", "proof", "deploy")
PIP_TARGET = (
    *("--only-binary=:all:", "--no-deps", "--implementation", "cp", "--python-version", "3.10"),
    *("--abi", "cp310", "--abi", "none", "--abi", "abi3"),
    *("--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64"),
)


def lay_out_python(folder: Path, wheels: Path, say: Say) -> None:
    """A CPython 3.10 with the shared libraries that its modules need, and the wheels of wheels.txt."""
    interpreter = find_python()
    prefix = Path(_ask(interpreter, "import sys; print(sys.base_prefix)"))
    say(f"copying CPython 3.10 from {prefix}")
    shutil.copytree(
        prefix / "lib" / "python3.10", folder / "lib" / "python3.10", symlinks=True, ignore=STDLIB_LEFT_OUT
    )
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(prefix / "bin" / "python3.10", folder / "bin" / "python3.10")
    for library in linked_libraries([folder / "bin" / "python3.10", *folder.rglob("lib-dynload/*.so")]):
        shutil.copy2(library, folder / "lib" / library.name)
    requirements = Path(__file__).with_name("wheels.txt")
    download(["--requirement", str(requirements)], wheels / "python", say)
    for wheel in sorted((wheels / "python").glob("*.whl")):
        unzip(wheel, folder / "site")


def lay_out_tensorrt(folder: Path, wheels: Path, say: Say) -> None:
    """The wheel's files, and the stand-ins beside them."""
    download([TENSORRT], wheels / "tensorrt", say)
    (wheel,) = (wheels / "tensorrt").glob("*.whl")
    unzip(wheel, folder)
    make_stand_ins(folder / "stand-ins")


def lay_out_code(folder: Path) -> None:
    """What of this checkout runs there."""
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=CODE_LEFT_OUT)
        else:
            shutil.copy2(source, target)


def find_python() -> str:
    """A CPython 3.10 on this machine.

    Raises:
        PackError: there is none.
    """
    if named := os.environ.get("PYTHON310"):
        return named
    for probe in survey():
        if probe.minor == VERSION:
            return str(probe.python)
    raise PackError("no CPython 3.10 is found: install one, or name it in PYTHON310")


def download(what: list[str], folder: Path, say: Say) -> None:
    """Fetch wheels for CPython 3.10 into `folder`; a full folder is left as it is.

    Raises:
        PackError: pip fails.
    """
    if folder.is_dir():
        return
    say(f"downloading {' '.join(what)}")
    partial = folder.with_name(f".{folder.name}.partial")
    command = [sys.executable, "-m", "pip", "download", "--quiet", *PIP_TARGET, "--dest", str(partial), *what]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        raise PackError(f"pip download failed: {fetched.stderr.strip()[-600:]}")
    partial.replace(folder)


def unzip(wheel: Path, folder: Path) -> None:
    """The files of a wheel, without its tests."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "/tests/" not in name:
                archive.extract(name, folder)


def make_stand_ins(folder: Path) -> None:
    """Empty shared libraries of the names that libnvinfer_plugin asks the loader for.

    Raises:
        PackError: there is no C compiler.
    """
    compiler = shutil.which(os.environ.get("CC", sysconfig.get_config_var("CC") or "cc").split()[0])
    compiler = compiler or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise PackError("no C compiler is on PATH to make the stand-in libraries with")
    folder.mkdir(parents=True)
    for name in STAND_INS:
        command = [compiler, "-shared", "-nostdlib", "-x", "c", "/dev/null", f"-Wl,-soname,{name}"]
        subprocess.run([*command, "-o", str(folder / name)], check=True)


def linked_libraries(files: Iterable[Path]) -> tuple[Path, ...]:
    """The shared libraries that `files` are linked to, glibc's own left out: those are the machine's."""
    found: dict[str, Path] = {}
    for file in files:
        listed = subprocess.run(["ldd", str(file)], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            match = re.search(r"=> (/\S+)", line)
            if match and not GLIBC.search(match[1]):
                found[Path(match[1]).name] = Path(match[1])
    return tuple(found[name] for name in sorted(found))


def _ask(interpreter: str, code: str) -> str:
    return subprocess.run(
        [interpreter, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
