"""Finding a Python for the server, and the shared libpython that Triton's stub loads for it.

Triton's Python backend runs models in a stub process that links libpython3.X.so. It must be of the same
patch version as the environment's interpreter, or extension modules such as `ssl` fail to load in it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.errors import ProvisionError
from tritonsmith.server.provision import clean_environment, run_quietly, silent

# Best first: numpy 1.26 has wheels for these.
VERSIONS = ("3.12", "3.11", "3.10")
# numpy 1.26 builds and works here, but only from source: minutes, a compiler and Python's headers.
SOURCE_VERSIONS = ("3.13",)

_PROBE = """
import json, os, platform, sys, sysconfig
from importlib.util import find_spec
get = sysconfig.get_config_var
print(json.dumps({
    "python": getattr(sys, "_base_executable", None) or sys.executable,
    "version": platform.python_version(),
    "folders": [f for f in (get("LIBDIR"), sys.base_prefix + "/lib",
                            "/usr/lib/" + (get("MULTIARCH") or ""), "/lib/" + (get("MULTIARCH") or "")) if f],
    "wordsize": sys.maxsize.bit_length() + 1,
    "venv": find_spec("venv") is not None,
    "pip": find_spec("ensurepip") is not None,
    "headers": os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")),
}))
"""

_LIBRARY_VERSION = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.Py_GetVersion.restype = ctypes.c_char_p
print(library.Py_GetVersion().decode().split()[0])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A Python that can carry the server's environment; `library` is its shared libpython."""

    python: Path
    version: str  # "3.11.7"
    library: Path

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one interpreter says of itself; `library` is None where no matching libpython is found."""

    python: Path
    version: str
    has_venv: bool
    has_ensurepip: bool
    has_headers: bool
    library: Path | None

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def find_interpreter(downloads: Path, *, say: Callable[[str], None] = silent) -> Interpreter:
    """The best Python on this machine for the server; `downloads` may receive a libpython.

    The running one first, then others of 3.10 to 3.12; then those whose libpython Debian's archive has; and
    3.13 last, where numpy can be compiled. Raises ProvisionError that lists what was tried.
    """
    probes = survey()
    for probe in probes:
        if what_lacks(probe) is None and probe.library is not None:
            return Interpreter(python=probe.python, version=probe.version, library=probe.library)
    for probe in probes:
        if probe.minor in VERSIONS and probe.library is None and probe.has_venv:
            library = download_library(probe, downloads, say=say)
            if library is not None:
                return Interpreter(python=probe.python, version=probe.version, library=library)
    for probe in probes:
        if probe.minor in SOURCE_VERSIONS and _can_compile(probe) and probe.library is not None:
            return Interpreter(python=probe.python, version=probe.version, library=probe.library)
    tried = [f"{probe.python}: {what_lacks(probe)}" for probe in probes]
    raise ProvisionError(
        "no Python here can run the embedded server",
        found="\n    ".join(tried) or "none",
        expected=f"Python {', '.join(reversed(VERSIONS))} with its shared library",
        fix="on Debian and Ubuntu: apt-get install python3-venv libpython3.X (X as in python3 --version); "
        "elsewhere: uv python install 3.12",
    )


def what_lacks(probe: Probe) -> str | None:
    """Why the server cannot use this Python as it is; None where it can."""
    if not probe.has_venv:
        return f"no venv module (apt-get install python{probe.minor}-venv)"
    if probe.minor in SOURCE_VERSIONS:
        need = f"a C and C++ compiler and Python.h (apt-get install build-essential python{probe.minor}-dev)"
        return f"numpy 1.26 has no wheel for Python {probe.minor}; building it needs {need}"
    if probe.minor not in VERSIONS:
        return f"Python {probe.version} is not among those of Triton's stub"
    if probe.library is None:
        return f"no shared libpython {probe.version} (apt-get install libpython{probe.minor})"
    return None


def _can_compile(probe: Probe) -> bool:
    return probe.has_venv and probe.has_headers and bool(shutil.which("cc") and shutil.which("c++"))


def download_library(probe: Probe, downloads: Path, *, say: Callable[[str], None] = silent) -> Path | None:
    """The libpython of a distribution's own Python, from Debian's archive; no root and no install.

    None where apt is not here, has no such package, or has another version.
    """
    if not (probe.python.is_relative_to("/usr/bin") and shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    package = f"libpython{probe.minor}"
    name = f"{package}.so.1.0"
    folder = downloads / f"{package}-{probe.version}"
    if not folder.is_dir():
        say(f"downloading {package} from the distribution's archive")
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{package}.", dir=downloads) as partial:
            if not _apt_download(package, Path(partial)):
                return None
            unpacked = Path(partial, "unpacked")
            deb = next(Path(partial).glob("*.deb"))
            if run_quietly(["dpkg-deb", "-x", str(deb), str(unpacked)]).returncode != 0:
                return None
            unpacked.replace(folder)
    found = next(folder.rglob(name), None)
    if found is None or library_version(probe.python, found) != probe.version:
        return None
    return found


def _apt_download(package: str, folder: Path) -> bool:
    """`apt-get download` into `folder`; with package lists of its own where the system has none."""
    if run_quietly(["apt-get", "download", package], cwd=folder).returncode == 0:
        return True
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder}"]
    if run_quietly(["apt-get", *options, "update"], cwd=folder).returncode != 0:
        return False
    return run_quietly(["apt-get", *options, "download", package], cwd=folder).returncode == 0


def survey() -> tuple[Probe, ...]:
    """Every Python of this machine that could carry the server, each once, the running one first."""
    found: dict[Path, Probe] = {}
    for path in candidates():
        if (probe := probe_interpreter(path)) is not None:
            found.setdefault(probe.python.resolve(), probe)
    return tuple(found.values())


def candidates() -> Iterator[Path]:
    """The running interpreter, then every python3.X on PATH and in the usual places; each file once."""
    seen: set[Path] = set()
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/bin", "/usr/bin"]
    named = [
        Path(folder, f"python{version}")
        for version in (*VERSIONS, *SOURCE_VERSIONS)
        for folder in folders
        if folder
    ]
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - pathlib's raises where there is no home
    pyenv = Path(os.environ.get("PYENV_ROOT") or home / ".pyenv")
    managed = [
        *sorted((home / ".local/share/uv/python").glob("*/bin/python3.1[0-3]")),
        *sorted(pyenv.glob("versions/*/bin/python3.1[0-3]")),
    ]
    for path in (Path(sys.executable), *named, *managed):
        # pathlib's is_file raises for a folder on PATH that this user may not enter
        if os.path.isfile(path) and path.resolve() not in seen:  # noqa: PTH113
            seen.add(path.resolve())
            yield path


def probe_interpreter(python: Path) -> Probe | None:
    """Ask `python` about itself; None where it does not run (a pyenv shim of no version, say)."""
    try:
        done = run_quietly([str(python), "-I", "-c", _PROBE], environment=clean_environment())
    except OSError:  # no permission, or made for another machine
        return None
    if done.returncode != 0:
        return None
    said = json.loads(done.stdout.splitlines()[-1])  # a sitecustomize may print before it
    if said["wordsize"] != 64:
        return None
    return Probe(
        python=Path(said["python"]),
        version=said["version"],
        has_venv=said["venv"],
        has_ensurepip=said["pip"],
        has_headers=said["headers"],
        library=_find_library(python, said["version"], said["folders"]),
    )


def _find_library(python: Path, version: str, folders: list[str]) -> Path | None:
    name = f"libpython{'.'.join(version.split('.')[:2])}.so.1.0"
    for folder in dict.fromkeys(folders):
        path = Path(folder, name)
        if path.is_file() and library_version(python, path) == version:
            return path
    return None


def library_version(python: Path, library: Path) -> str | None:
    """The exact Python version inside a shared libpython; None where it cannot be loaded."""
    done = run_quietly([str(python), "-I", "-c", _LIBRARY_VERSION, str(library)])
    return done.stdout.strip() if done.returncode == 0 else None
