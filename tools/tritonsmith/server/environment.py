"""The server's own environment: a real tritonserver and a Python of its own, in the cache folder.

<cache>/wheels/nvidia_pytriton-0.7.0/        tritonserver 2.51.0 (24.10), unpacked, shared by all
<cache>/environments/<key>/                  the base: a venv with server/requirements.txt
    bin/python3  lib/...                     what models run in
    triton/lib/libpython3.X.so.1.0           a link to the libpython of the same build
    triton/backends/python/                  Triton's Python backend and the stub of this version
    environment.json                         written last: without it the folder is incomplete
<cache>/environments/<key>/                  a layer: a venv over the base, with a model's own packages
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tritonsmith.errors import ProvisionError
from tritonsmith.files import locked, write_text_atomically
from tritonsmith.server.interpreter import (
    SOURCE_VERSIONS,
    Interpreter,
    Probe,
    find_interpreter,
    probe_interpreter,
)
from tritonsmith.server.provision import (
    cache_folder,
    clean_environment,
    run_pip,
    run_quietly,
    silent,
    unpack_wheel,
)

__all__ = [
    "ServerEnvironment",
    "cache_folder",
    "ensure_environment",
    "find_environment",
    "stage_requirements",
]

TRITON_WHEEL = "nvidia-pytriton==0.7.0"
BASE_PINS = Path(__file__).with_name("requirements.txt")

# Raise it when what this module lays down changes: old environments are then left alone.
_LAYOUT = 5
_RECORD = "environment.json"

# Triton's stub starts Python in the C locale and reads no PYTHON variables: text would be ASCII, and a
# repository would fill with __pycache__. Python runs this line when it starts.
_START = (
    "import locale, sys; sys.dont_write_bytecode = True; locale.setlocale(locale.LC_CTYPE, 'C.UTF-8'); "
    "[s.reconfigure(encoding='utf-8') for s in (sys.stdout, sys.stderr) if hasattr(s, 'reconfigure')]\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEnvironment:
    """Where the parts of a complete environment lie; every path exists."""

    folder: Path
    python: Path  # of the venv that models run in
    python_version: str  # "3.11.7"
    tritonserver: Path
    python_library_folder: Path  # holds libpython alone; first on LD_LIBRARY_PATH
    library_folder: Path  # what tritonserver is linked with; second
    backends: Path  # holds python/
    caches: Path  # for --cache-directory
    requirements: tuple[str, ...]  # beyond the base pins


def ensure_environment(
    requirements: Sequence[str] = (), *, say: Callable[[str], None] = silent
) -> ServerEnvironment:
    """The environment with the base pins and `requirements` (pip's format), built where it is missing.

    A complete one is found without the network in milliseconds. A build that was interrupted is begun anew;
    a second build at the same time waits for the first. Raises ProvisionError.
    """
    wanted = tuple(sorted({line.strip() for line in requirements} - {""}))
    environments = cache_folder() / "environments"
    base = environments / _key(())
    environment = _read(base) or _build(base, (), lambda: _build_base(base, say=say), say=say)
    if not wanted:
        return environment
    layer = environments / _key(wanted)
    return _read(layer) or _build(
        layer, wanted, lambda: _build_layer(layer, environment, wanted, say=say), say=say
    )


def find_environment() -> ServerEnvironment | None:
    """The base environment where it is complete; nothing is built."""
    return _read(cache_folder() / "environments" / _key(()))


def stage_requirements(repository: Path) -> tuple[str, ...]:
    """The union of `<repository>/<model>/requirements.txt`: what the Python stages need, sorted.

    Raises ProvisionError for a line that is an option (`-r other.txt`): one file a model says it all;
    and for one that is not UTF-8.
    """
    lines: set[str] = set()
    for path in sorted(repository.glob("*/requirements.txt")):
        lines.update(read_requirements(path))
    return tuple(sorted(lines))


def read_requirements(path: Path) -> tuple[str, ...]:
    """The requirements of one file, in its order. Raises ProvisionError as `stage_requirements`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProvisionError(f"{path} cannot be read", found=error, expected="text in UTF-8") from error
    lines = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("-") or line.endswith("\\"):
            raise ProvisionError(
                f"{path}, line {number}: only packages can be named here",
                found=line,
                expected="one requirement a line, such as pillow>=11",
            )
        lines.append(line)
    return tuple(lines)


def _key(requirements: tuple[str, ...]) -> str:
    """Names an environment by all that it is made from; the running Python stands for the choice of one."""
    base_python = getattr(sys, "_base_executable", None) or sys.executable
    parts = [
        str(_LAYOUT),
        TRITON_WHEEL,
        BASE_PINS.read_text(encoding="utf-8"),
        str(Path(base_python).resolve()),
        sys.version,
        *requirements,
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"{'layer' if requirements else 'base'}-{digest}"


def _read(folder: Path) -> ServerEnvironment | None:
    """The record of a complete environment; None where it, or a part that it names, is missing."""
    try:
        said = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        environment = ServerEnvironment(
            folder=folder,
            python=Path(said["python"]),
            python_version=said["python_version"],
            tritonserver=Path(said["tritonserver"]),
            python_library_folder=Path(said["python_library_folder"]),
            library_folder=Path(said["library_folder"]),
            backends=Path(said["backends"]),
            caches=Path(said["caches"]),
            requirements=tuple(said["requirements"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    libpython = list(environment.python_library_folder.glob("libpython*"))
    needed = [environment.python, environment.tritonserver, environment.backends / "python", *libpython]
    return environment if libpython and all(path.exists() for path in needed) else None


def _build(
    folder: Path,
    requirements: tuple[str, ...],
    build: Callable[[], ServerEnvironment],
    *,
    say: Callable[[str], None],
) -> ServerEnvironment:
    """Run `build` under a lock and record what it made; whatever lay in `folder` was incomplete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), say=say):
        if (found := _read(folder)) is not None:  # the one that held the lock built it
            return found
        shutil.rmtree(folder, ignore_errors=True)
        try:
            environment = build()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        write_text_atomically(folder / _RECORD, json.dumps(asdict(environment), indent=1, default=str))
    return environment


def _build_base(folder: Path, *, say: Callable[[str], None]) -> ServerEnvironment:
    downloads = cache_folder() / "downloads"
    interpreter = find_interpreter(downloads, say=say)
    say(f"setting up the server's environment in {folder} (once, about a minute)")
    python = _make_venv(folder, interpreter.python, say=say)
    wheel = unpack_wheel(
        TRITON_WHEEL, cache_folder() / "wheels" / TRITON_WHEEL.replace("==", "-"), python=python, say=say
    )
    if interpreter.minor in SOURCE_VERSIONS:
        _build_numpy(python, folder / "tmp", say=say)
    say("installing the server's packages: numpy 1.26, onnxruntime, openvino")
    run_pip(
        python,
        ["install", "--only-binary=:all:", "--requirement", str(BASE_PINS)],
        scratch=folder / "tmp",
        what="cannot install the server's packages",
    )
    _site_packages(python).joinpath("tritonsmith_start.pth").write_text(_START, encoding="utf-8")
    return _lay_triton(folder, python, interpreter, wheel)


def _build_numpy(python: Path, scratch: Path, *, say: Callable[[str], None]) -> None:
    """numpy from its source, without the variants for other CPUs: the server only moves tensors with it."""
    requirement = next(
        line for line in BASE_PINS.read_text(encoding="utf-8").splitlines() if "numpy==" in line
    )
    say(f"building {requirement} from source: no older Python is here, and it has no wheel (some minutes)")
    settings = ["-Csetup-args=-Dcpu-dispatch=none", "-Csetup-args=-Dallow-noblas=true"]
    run_pip(
        python,
        ["install", requirement, *settings],
        scratch=scratch,
        what=f"cannot build {requirement} for this Python",
    )


def _build_layer(
    folder: Path, base: ServerEnvironment, requirements: tuple[str, ...], *, say: Callable[[str], None]
) -> ServerEnvironment:
    """A venv that sees the base's packages through a .pth file, so that only the additions are installed."""
    say(f"adding the packages of the Python stages: {', '.join(requirements)}")
    done = run_quietly(
        [str(base.python), "-I", "-m", "venv", "--without-pip", str(folder)], environment=clean_environment()
    )
    python = folder / "bin" / "python3"
    if done.returncode != 0:
        raise ProvisionError(f"cannot make a virtual environment in {folder}", found=done.stderr.strip())
    _site_packages(python).joinpath("tritonsmith_base.pth").write_text(
        f"import site; site.addsitedir({str(_site_packages(base.python))!r})\n", encoding="utf-8"
    )
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    run_pip(
        python,
        ["install", "--requirement", str(wanted), "--constraint", str(BASE_PINS)],
        scratch=folder / "tmp",
        what=f"cannot install the packages of the Python stages: {', '.join(requirements)}",
    )
    return ServerEnvironment(
        folder=folder,
        python=python,
        python_version=base.python_version,
        tritonserver=base.tritonserver,
        python_library_folder=base.python_library_folder,
        library_folder=base.library_folder,
        backends=base.backends,
        caches=base.caches,
        requirements=requirements,
    )


def _make_venv(folder: Path, base_python: Path, *, say: Callable[[str], None]) -> Path:
    """A venv with pip; where Debian left out ensurepip, pip is copied by the running Python's pip."""
    probe = probe_interpreter(base_python)
    with_pip = probe is not None and probe.has_ensurepip
    command = [str(base_python), "-I", "-m", "venv", *([] if with_pip else ["--without-pip"]), str(folder)]
    done = run_quietly(command, environment=clean_environment())
    python = folder / "bin" / "python3"
    if done.returncode != 0 and with_pip and "ensurepip" in done.stdout + done.stderr:
        shutil.rmtree(folder, ignore_errors=True)
        with_pip = False
        done = run_quietly([*command[:4], "--without-pip", str(folder)], environment=clean_environment())
    if done.returncode != 0:
        raise ProvisionError(
            f"cannot make a virtual environment in {folder}",
            found=(done.stderr or done.stdout).strip(),
            fix=_venv_fix(probe),
        )
    if not with_pip:
        say("this Python brings no pip of its own; taking the running one's")
        run_pip(
            Path(sys.executable),
            ["--python", str(python), "install", "pip"],
            scratch=folder / "tmp",
            what=f"{base_python} has no ensurepip, and pip cannot be brought in another way",
        )
    return python


def _venv_fix(probe: Probe | None) -> str:
    version = probe.minor if probe is not None else "3"
    return f"on Debian and Ubuntu: apt-get install python{version}-venv"


def _site_packages(python: Path) -> Path:
    return next((python.parent.parent / "lib").glob("python3.*")) / "site-packages"


def _lay_triton(folder: Path, python: Path, interpreter: Interpreter, wheel: Path) -> ServerEnvironment:
    """Triton's Python backend with the stub of this Python, and a folder with its libpython alone.

    The stub is copied: the loader resolves $ORIGIN in its run path through links, and would find the
    wheel's own libraries before LD_LIBRARY_PATH.
    """
    triton = wheel / "pytriton" / "tritonserver"
    backend = folder / "triton" / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    shutil.copy2(
        triton / "python_backend_stubs" / interpreter.minor / "triton_python_backend_stub",
        backend / "triton_python_backend_stub",
    )
    libraries = folder / "triton" / "lib"
    libraries.mkdir()
    # The stub for 3.13 asks for the libpython of the wheel, by that one's name.
    bundled = next((wheel / "nvidia_pytriton.libs").glob(f"libpython3*.{interpreter.minor[2:]}.so.1.0"), None)
    (libraries / (bundled or interpreter.library).name).symlink_to(interpreter.library)
    return ServerEnvironment(
        folder=folder,
        python=python,
        python_version=interpreter.version,
        tritonserver=triton / "bin" / "tritonserver",
        python_library_folder=libraries,
        library_folder=wheel / "nvidia_pytriton.libs",
        backends=backend.parent,
        caches=triton / "caches",
        requirements=(),
    )
