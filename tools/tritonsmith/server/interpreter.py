"""Finding a Python for the server, and the shared libpython that Triton's stub loads for it.

Triton's Python backend runs models in a stub process that links libpython3.X.so. It must be of the same
patch version as the environment's interpreter, or extension modules such as `ssl` fail to load in it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.errors import ProvisionError
from tritonsmith.server.provision import clean_environment, run_quietly, silent

# Best first: numpy 1.26 has wheels for these.
VERSIONS = ("3.12", "3.11", "3.10")

_PROBE = """
import json, platform, sys, sysconfig
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
    library: Path | None

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def find_interpreter(downloads: Path, *, say: Callable[[str], None] = silent) -> Interpreter:
    """The best Python on this machine for the server; `downloads` may receive a libpython.

    The running one first, then others of 3.10 to 3.12. Raises ProvisionError that lists what was tried.
    """
    tried: list[str] = []
    probes = [probe for path in candidates() if (probe := probe_interpreter(path)) is not None]
    for probe in probes:
        if probe.minor not in VERSIONS:
            tried.append(f"{probe.python}: Python {probe.version}, and numpy 1.26 has no wheel for it")
        elif not probe.has_venv:
            tried.append(f"{probe.python}: no venv module (apt-get install python{probe.minor}-venv)")
        elif probe.library is None:
            tried.append(f"{probe.python}: no shared libpython {probe.version}")
        else:
            return Interpreter(python=probe.python, version=probe.version, library=probe.library)
    raise ProvisionError(
        "no Python here can run the embedded server",
        found="\n    ".join(tried) or "none",
        expected=f"Python {', '.join(reversed(VERSIONS))} with its shared library",
        fix="on Debian and Ubuntu: apt-get install python3-venv libpython3.11 (the version of your python3)",
    )


def candidates() -> Iterator[Path]:
    """The running interpreter, then every python3.X on PATH and in the usual places; each file once."""
    seen: set[Path] = set()
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/bin", "/usr/bin"]
    named = [Path(folder, f"python{version}") for version in VERSIONS for folder in folders if folder]
    managed = sorted(Path("~/.local/share/uv/python").expanduser().glob("*/bin/python3.1[0-2]"))
    for path in (Path(sys.executable), *named, *managed):
        if path.is_file() and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path


def probe_interpreter(python: Path) -> Probe | None:
    """Ask `python` about itself; None where it does not run (a pyenv shim of no version, say)."""
    done = run_quietly([str(python), "-I", "-c", _PROBE], environment=clean_environment())
    if done.returncode != 0:
        return None
    said = json.loads(done.stdout)
    if said["wordsize"] != 64:
        return None
    return Probe(
        python=Path(said["python"]),
        version=said["version"],
        has_venv=said["venv"],
        has_ensurepip=said["pip"],
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


def is_available(command: str) -> bool:
    return shutil.which(command) is not None
