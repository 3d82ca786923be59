"""Fetching packages from the index, so that an interrupted or second run does no harm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tritonsmith.errors import ProvisionError

CACHE_VARIABLE = "TRITONSMITH_CACHE"

# These steer another Python or another folder than the one that is being filled.
_FOREIGN_VARIABLES = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_USER",
    "PIP_CONSTRAINT",
    "PIP_REQUIREMENT",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_PYTHON",
    "VIRTUAL_ENV",
    "__PYVENV_LAUNCHER__",
)


def silent(_: str) -> None:
    """The `say` of a caller that wants no progress lines."""


def cache_folder() -> Path:
    """The folder for everything that tritonsmith downloads: made where it is missing.

    `$TRITONSMITH_CACHE`, else `$XDG_CACHE_HOME/tritonsmith`, else `~/.cache/tritonsmith`.
    Raises ProvisionError, naming the variable, where it cannot be written.
    """
    folder = _named_cache_folder()
    fix = f"set {CACHE_VARIABLE} to a folder that you can write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProvisionError(
            f"cannot make the cache folder {folder}", found=error.strerror or error, fix=fix
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ProvisionError(f"cannot write to the cache folder {folder}", found="no permission", fix=fix)
    return folder


def step_store() -> Path:
    """Where the results of compression steps are kept, by content."""
    return cache_folder() / "steps"


def plan_cache() -> Path:
    """Where plans that this machine built are kept, by content."""
    return cache_folder() / "plans"


def _named_cache_folder() -> Path:
    # The XDG specification says that a relative path there is to be ignored.
    named = os.environ.get(CACHE_VARIABLE)
    if not named and (xdg := os.environ.get("XDG_CACHE_HOME")) and Path(xdg).is_absolute():
        return Path(xdg) / "tritonsmith"
    try:
        if named:
            return Path(named).expanduser().absolute()
        return Path.home() / ".cache" / "tritonsmith"
    except RuntimeError as error:
        raise ProvisionError(
            "no home folder to keep the cache in", found=error, fix=f"set {CACHE_VARIABLE} to a folder"
        ) from error


def unpack_wheel(
    requirement: str, folder: Path, *, python: Path | None = None, say: Callable[[str], None] = silent
) -> Path:
    """Download the wheel of `requirement` alone, unpack it as `folder`, and return `folder`.

    Nothing is installed and no code of the wheel runs. A `folder` that holds anything is complete and is
    kept. `python` is the interpreter whose pip downloads (the running one by default). Raises ProvisionError.
    """
    if _is_filled(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        say(f"downloading {requirement}")
        wheels = Path(partial, "wheels")
        run_pip(
            python or Path(sys.executable),
            ["download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), requirement],
            scratch=Path(partial),
            what=f"cannot download {requirement}",
        )
        unpacked = Path(partial, "unpacked")
        _unzip(next(iter(wheels.glob("*.whl"))), unpacked)
        try:
            unpacked.replace(folder)
        except OSError:
            if not _is_filled(folder):  # else another process was faster
                raise
    return folder


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _unzip(wheel: Path, folder: Path) -> None:
    """Unzip with the modes that the wheel records; refuse members that climb out of `folder`."""
    root = folder.resolve()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            target = (root / member.filename).resolve()
            if not target.is_relative_to(root):
                raise ProvisionError(f"{wheel.name} holds a file outside of itself", found=member.filename)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
            if mode := (member.external_attr >> 16) & 0o777:
                target.chmod(mode | 0o600)


def run_pip(python: Path, arguments: Sequence[str], *, scratch: Path, what: str) -> None:
    """Run `python -m pip` with `arguments`; `scratch` is a folder for its temporary files.

    A failure is a ProvisionError that begins with `what` and quotes pip's own error lines.
    """
    command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    done = run_quietly(command, environment=pip_environment(scratch))
    if done.returncode != 0:
        raise ProvisionError(
            what,
            found=_relevant_lines(done.stderr) or _relevant_lines(done.stdout),
            fix=_pip_fix(done.stderr + done.stdout),
        )


def run_quietly(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end with the output captured; the return code is the caller's to judge."""
    return subprocess.run(
        list(command),
        env=dict(environment) if environment is not None else None,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        close_fds=False,  # only the lock is inheritable
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would mix this Python with another one."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN_VARIABLES}


def pip_environment(scratch: Path) -> dict[str, str]:
    """`clean_environment` with a writable folder for temporary files and for pip's cache."""
    scratch.mkdir(parents=True, exist_ok=True)
    environment = clean_environment() | {"TMPDIR": str(scratch)}
    if "PIP_CACHE_DIR" not in environment and not _home_is_writable():
        environment["PIP_CACHE_DIR"] = str(cache_folder() / "pip")
    return environment


def _home_is_writable() -> bool:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 - may be no home
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    return os.access(cache, os.W_OK)


def _relevant_lines(text: str, *, limit: int = 12) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "error:" in line.lower()]
    return "\n    ".join((errors or lines)[-limit:])


def _pip_fix(output: str) -> str:
    if "No module named pip" in output:
        return "install pip; on Debian and Ubuntu: apt-get install python3-pip python3-venv"
    if "No space left on device" in output:
        return f"free some space, or set {CACHE_VARIABLE} to a folder with more (about 1 GB is needed)"
    if "ResolutionImpossible" in output or "conflict" in output:
        return "change the package that conflicts in the models' requirements.txt (the server needs numpy<2)"
    if "No matching distribution" in output or "Could not find a version" in output:
        return (
            "check the name and version, that the package index is in reach, and that glibc is 2.35 or newer"
        )
    return "check that the package index can be reached (pip config list), then run the same command again"
